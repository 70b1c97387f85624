"""What is published: sdist and wheel hold what the tree does, and the wheel works by itself."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREES = {"fastres": "fastres", "kernels": "fastres/kernels", "calib": "fastres/calib"}
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
NOT_PUBLISHED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so")
COMPILED = (
    "fastres/kernels/cpu/libfastres_cpu.so"  # of these, in the wheel where there is a compiler
)
SOURCES = (".cpp", ".h")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is published, without what this checkout has built."""
    folder = tmp_path_factory.mktemp("tree")
    for name in TREES:
        shutil.copytree(ROOT / name, folder / name, ignore=NOT_PUBLISHED)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel, built of the sdist, and that, by suffix."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean())
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-2000:]
    assert "absent from" not in said and "Warning" not in said, said
    return {path.suffix: path for path in out.iterdir()}


def can_compile() -> bool:
    """Whether this machine has what the kernels of the CPU are built with."""
    return platform.machine() == "x86_64" and shutil.which("c++") is not None


def clean() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}


def files_of(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def test_the_wheel_holds_what_the_tree_does(tree: Path, built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built[".whl"]) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = {f"{home}/{f}" for name, home in TREES.items() for f in files_of(tree / name)}
    assert inside - {COMPILED} == {name for name in files if not name.endswith(SOURCES)}
    assert (COMPILED in inside) == can_compile()
    for needed in ("py.typed", "report/page.js", "backends/triton/planning/tables/__init__.py"):
        assert f"fastres/{needed}" in inside
    assert any(name.endswith("tables/tiles_nvidia_h200_132sm.json") for name in inside)


def test_the_sdist_holds_what_the_tree_does(tree: Path, built: dict[str, Path]) -> None:
    with tarfile.open(built[".gz"]) as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    made = {name for name in names if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    trees = {f"{name}/{file}" for name in TREES for file in files_of(tree / name)}
    assert names - made == trees | {*FILES}


def test_without_a_compiler_all_else_is_built(tree: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
    ]
    nothing = {name: str(tmp_path / "none") for name in ("CC", "CXX")}
    done = subprocess.run(
        [*command, "--outdir", str(tmp_path), str(tree)],
        capture_output=True,
        text=True,
        env=clean() | nothing,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as built:
        assert COMPILED not in built.namelist() and "fastres/__init__.py" in built.namelist()


def test_what_is_said_of_it_can_be_shown(built: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.values())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


@pytest.fixture(scope="module")
def installed(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and what it needs from this one."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    here = Path(pytest.__file__).parents[1]  # searched after its own, and its .pth are not read
    (packages / "needed.pth").write_text(f"{here}\n")
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    install += ["--ignore-installed", "--no-index", "--no-warn-script-location"]
    subprocess.run([*install, str(built[".whl"])], check=True, env=clean())
    return folder / "bin"


def run(installed: Path, folder: Path, *command: str) -> str:
    done = subprocess.run(
        [str(installed / command[0]), *command[1:]],
        cwd=folder,
        env=clean(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


USED = """
import sys, numpy, torch, fastres, fastres.kernels.tiles
from fastres.kernels.cpu import library
from fastres.backends.triton.planning.table import Machine, shipped
assert fastres.__file__.startswith(sys.prefix) and fastres.kernels.__file__.startswith(sys.prefix)
assert library.why_not() is None or "not built" in library.why_not(), library.why_not()
assert len(shipped(Machine("NVIDIA H200", 132, "", "")).entries) > 300
engine = fastres.load("engine.fastres")
print(tuple(engine(torch.zeros(2, 3, 32, 32)).shape))
"""


def test_the_wheel_works_far_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_sample_image

    Image.fromarray(load_sample_image("china.jpg")).save(tmp_path / "china.jpg")
    assert "cpu" in run(installed, tmp_path, "fastres", "doctor")
    assert "PASSED" in run(installed, tmp_path, "fastres", "verify", "fastres:cifar_resnet20")
    run(installed, tmp_path, "fastres", "compile", "fastres:cifar_resnet20", "-o", "engine.fastres")
    assert "china.jpg" in run(
        installed, tmp_path, "fastres", "predict", "engine.fastres", "china.jpg"
    )
    assert run(installed, tmp_path, "python", "-W", "error", "-c", USED) == "(2, 10)\n"
