"""A checkout works where nothing of it is installed, and with few packages: on a GPU's machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FEW = ("torch", "triton", "numpy", "safetensors", "msgspec", "pytest")


def with_all_they_need(names: Iterable[str]) -> dict[str, metadata.Distribution]:
    found: dict[str, metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found[name] = metadata.distribution(name)
        for line in found[name].requires or ():
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                waiting.append(need.name)
    return found


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with these packages and no others."""
    folder = tmp_path_factory.mktemp("few")
    for package in with_all_they_need(FEW).values():
        for top in {file.parts[0] for file in package.files or () if file.parts[0] != ".."}:
            if not (folder / top).exists() and Path(str(package.locate_file(top))).exists():
                (folder / top).symlink_to(Path(str(package.locate_file(top))))
    return folder


@pytest.fixture(scope="module", params=["nothing installed", "installed"])
def site(
    request: pytest.FixtureRequest, few: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """These packages, and fastres beside them or not."""
    if request.param == "nothing installed":
        return few
    source = tmp_path_factory.mktemp("source")
    for name in ("fastres", "kernels", "calib"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(folder), str(source)], check=True, env=environment())
    for package in few.iterdir():
        (folder / package.name).symlink_to(package)
    return folder


def environment(site: Path | None = None) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return kept | ({} if site is None else {"PYTHONPATH": str(site)})


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In the checkout's root, as somebody types it there."""
    command = [sys.executable, "-S", *arguments]  # -S: without this environment's packages
    return subprocess.run(command, cwd=ROOT, env=environment(site), capture_output=True, text=True)


def test_the_command_says_what_it_lacks(site: Path) -> None:
    done = run(site, "-m", "fastres", "doctor")
    assert done.returncode == 3 and not done.stderr, done.stderr
    first, *rest = done.stdout.splitlines()
    assert re.fullmatch(
        r"error: the command line needs (typer|rich), which is not installed", first
    )
    assert "openvino: not installed" in rest and "backend reference: can run here" in rest
    assert any(line.startswith("to install: pip install") and "openvino" in line for line in rest)


def test_the_tests_of_a_gpu_are_found(site: Path) -> None:
    done = run(site, "-m", "pytest", "-m", "gpu", "--collect-only", "-q")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = re.search(r"(\d+)/\d+ tests collected", done.stdout)
    assert found and int(found[1]) > 500
    assert "tests/kernels/conv2d/test_pointers.py" in done.stdout and "test_run.py" in done.stdout


def test_the_questions_to_a_gpu_can_be_asked(site: Path) -> None:
    done = run(site, "-m", "bench.gpu", "--help")
    assert done.returncode == 0 and "--budget" in done.stdout, done.stderr[-2000:]


def test_each_module_is_there_once_and_an_engine_runs(site: Path) -> None:
    code = """
import sys, torch, fastres, fastres.kernels.reference, fastres.calib.images
model, x = torch.nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 8, 8)
engine = fastres.compile(model, x, backend="reference")
assert torch.allclose(engine(x), model(x), atol=1e-5) and fastres.verify(model, engine, x).passed
names = [m for m in sys.modules if m.split(".")[0] in ("kernels", "calib")]
assert not names, names
files = {m: v.__file__ for m, v in sys.modules.items() if m.startswith("fastres.")}
print(len(files), len(set(files.values())), files["fastres.kernels.reference"])
"""
    done = run(site, "-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    modules, files, where = done.stdout.split()
    assert modules == files and Path(where) == ROOT / "kernels" / "reference.py"
