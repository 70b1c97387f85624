"""The house rules: who may import whom, and what an import may cost."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"fastres": "fastres", "kernels": "fastres.kernels", "calib": "fastres.calib"}
SOURCES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))

EXAMPLES = ("utils.py", "runtime/cache.py", "setup.py")  # that the docs speak of, and are not here
GROUND = (ROOT / "bench", ROOT / "examples")


def floors(package: str) -> list[list[str]]:
    """From the ground up: the rows of a package's table in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition(f"| floor | of `{package}` |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`(\w+)`", line) for line in table.splitlines()[2:]]
    return [[f"{package}.{name}" for name in row] for row in reversed(rows)]


HOUSES = {package: floors(package) for package in ("fastres", "fastres.kernels")}
ONLY_IN = {  # package → the modules that may import it
    "triton": ("fastres.kernels", "fastres.backends.triton"),
    "openvino": ("fastres.backends.openvino_runtime",),
    "onnx": ("fastres.graph.onnx", "fastres.graph.onnx_nodes", "fastres.graph.onnx_writer"),
    "onnxruntime": ("fastres.timing", "fastres.backends.onnx_runtime"),
    "torchvision": ("fastres.cli",),
    "timm": ("fastres.cli",),
    "transformers": (),
    "typer": ("fastres.cli",),
    "tensorrt": ("fastres.backends.tensorrt",),
    "tensorrt_rtx": ("fastres.backends.tensorrt",),
    "pycuda": ("fastres.deploy",),
    "matplotlib": ("fastres.report",),
    "cuda": ("fastres.kernels",),
    "bench": (),  # which no wheel holds
}
TRITON_FREE = (  # files and folders of kernels/
    "__init__.py",
    "compiled/__init__.py",
    "compiled/binary.py",
    "compiled/device_memory.py",
    "compiled/driver.py",
    "compiled/tensor_map.py",
    "cost.py",
    "epilogue.py",
    "folding.py",
    "geometry.py",
    "pairs.py",
    "reference.py",
    "tiles",
)


def module_of(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = [FOLDERS[folder], *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> list[str]:
    """Every module that a file imports: inside functions and for types alone, too."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def floor_of(module: str, house: list[list[str]]) -> int | None:
    for i, floor in enumerate(house):
        if any(module == name or module.startswith(name + ".") for name in floor):
            return i
    return None


def looks_up(module: str, imports: Iterable[str]) -> list[str]:
    """What a module imports from above it, in each house that it is in."""
    found = []
    for package, house in HOUSES.items():
        if module.startswith(package + "."):
            own = floor_of(module, house)
            assert own is not None, f"{module} is on no floor: add it to docs/architecture.md"
            found += [name for name in imports if (floor_of(name, house) or 0) > own]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_point_downwards(path: Path) -> None:
    if module_of(path) != "fastres":  # the public face imports everything, lazily
        assert not looks_up(module_of(path), imports_of(path))


def test_a_look_upwards_is_seen(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("def f():\n    from fastres.compiler import compile\n")
    assert looks_up("fastres.engine.planted", imports_of(planted)) == [
        "fastres.compiler",
        "fastres.compiler.compile",
    ]
    planted.write_text("if TYPE_CHECKING:\n    from fastres.cli import flags\n")
    assert looks_up("fastres.engine.planted", imports_of(planted))
    planted.write_text("from fastres.graph import ir\n")
    assert not looks_up("fastres.engine.planted", imports_of(planted))
    planted.write_text("from fastres.kernels.pool import max_pool\n")
    assert looks_up("fastres.kernels.tiles.planted", imports_of(planted))
    assert not looks_up("fastres.kernels.aot.planted", imports_of(planted))


def circle_of(imports: Mapping[str, Iterable[str]]) -> set[str]:
    """Files that import each other in a circle, and those that stand upon them; none if none."""
    left = {name: set(found) & imports.keys() - {name} for name, found in imports.items()}
    while free := [name for name, found in left.items() if not found & left.keys()]:
        for name in free:
            del left[name]
    return set(left)


def imports_in(tree: Path) -> dict[str, list[str]]:
    """What each file of a package, or of a folder of scripts, imports; by the names they use."""
    top = tree.parent if (tree / "__init__.py").exists() else tree
    files = {path.relative_to(top).with_suffix(""): path for path in tree.rglob("*.py")}
    return {".".join(name.parts): imports_of(path) for name, path in files.items()}


def wings_of(imports: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """What each folder of a package imports; a file beside the folders is one for itself."""
    found: dict[str, set[str]] = {}
    for name, names in imports.items():
        wing, *others = (".".join(one.split(".")[:2]) for one in (name, *names))
        found.setdefault(wing, set()).update(others)
    return found


def test_no_files_import_each_other() -> None:
    modules = {module_of(path): imports_of(path) for path in SOURCES}
    assert not circle_of({name: found for name, found in modules.items() if name != "fastres"})
    for folder in GROUND:
        assert not circle_of(imports_in(folder))
        assert not circle_of(wings_of(imports_in(folder)))


def test_a_circle_is_seen(tmp_path: Path) -> None:
    assert circle_of({"a": ["b"], "b": ["c"], "c": ["a", "d"], "d": []}) == {"a", "b", "c"}
    house = tmp_path / "house"
    for name, code in {
        "__init__": "",
        "beside": "",
        "east/low": "from house import beside",
        "east/high": "from house.west.low import x",
        "west/low": "import house.beside",
        "west/high": "from house.west import low",
    }.items():
        (house / name).parent.mkdir(exist_ok=True, parents=True)
        (house / f"{name}.py").write_text(code)
    assert len(imports_in(house)) == 6 and not circle_of(wings_of(imports_in(house)))
    (house / "west" / "high.py").write_text("def f():\n    from house.east import low")
    assert not circle_of(imports_in(house))
    assert circle_of(wings_of(imports_in(house))) == {"house.east", "house.west"}
    (house / "west" / "low.py").write_text("from house.east.high import y")
    assert circle_of(imports_in(house)) == {"house.east.high", "house.west.low"}


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_packages_are_imported_where_they_belong(path: Path) -> None:
    module = module_of(path)
    for name in imports_of(path):
        package = name.split(".")[0]
        assert package not in ("kernels", "calib"), f"{module}: write fastres.{package}"
        if package in ONLY_IN:
            allowed = ONLY_IN[package]
            assert any(module == a or module.startswith(a + ".") for a in allowed), (
                f"{module} imports {name}; only {allowed} may"
            )


def all_that_comes_along(module: str, modules: Mapping[str, Iterable[str]]) -> set[str]:
    """What an import of a module imports: packages around it, what those import, and so on."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        parts = waiting.pop().split(".")
        names = {".".join(parts[:i]) for i in range(1, len(parts) + 1)} - found
        found |= names
        waiting += [inner for name in names for inner in modules.get(name, ())]
    return found


def test_data_parts_of_the_kernels_import_no_triton() -> None:
    modules = {module_of(path): imports_of(path) for path in (ROOT / "kernels").rglob("*.py")}
    assert "triton" in all_that_comes_along("fastres.kernels.compiled.build", modules)
    for name in TRITON_FREE:
        path = ROOT / "kernels" / name
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            assert "triton" not in all_that_comes_along(module_of(file), modules), file
    of_a_package = {"a": ["a.c"], "a.b": ["os"], "a.c": ["triton.language"]}
    assert "triton" in all_that_comes_along("a.b", of_a_package)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_files_are_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400, "would a reader know their way in it?"


def not_published(tree: Path) -> list[str]:
    """Folders with sources that are no packages, which is what setup.py looks for."""
    folders = {path.parent for path in tree.rglob("*.py")}
    return sorted(str(f.relative_to(tree)) for f in folders if not (f / "__init__.py").exists())


def test_every_folder_is_in_the_wheel(tmp_path: Path) -> None:
    for folder in FOLDERS:
        assert not not_published(ROOT / folder)
    for name in ("__init__.py", "inner/__init__.py", "inner/forgotten/planted.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert not_published(tmp_path) == ["inner/forgotten"]


def test_files_that_the_docs_name_are_there() -> None:
    there = {str(path.relative_to(ROOT)) for path in ROOT.glob("[!.]*/**/*.py")}
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        if page.name == "CHANGELOG.md":
            continue
        for name in re.findall(r"`([\w/]+\.py)`", page.read_text()):
            known = name in EXAMPLES or "NAME" in name
            assert known or any(f"/{path}".endswith(f"/{name}") for path in there), (
                page.name,
                name,
            )


def not_there(text: str) -> list[str]:
    """Benchmarks that a text tells to run, or names, and that are not here."""
    modules = re.findall(r"-m\s+(bench(?:\.\w+)*)", text)
    found = {name: ROOT / name.replace(".", "/") for name in modules}
    missing = [
        name
        for name, at in found.items()
        if not at.with_suffix(".py").exists() and not (at / "__main__.py").exists()
    ]
    files = re.findall(r"(?<![\w/])bench/[\w/]+\.py", text)
    return missing + [name for name in files if not (ROOT / name).exists()]


def test_benchmarks_that_are_named_are_there() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "Makefile", *SOURCES]
    pages += ROOT.glob("bench/**/*.py")
    told = {page: page.read_text() for page in pages if page.name != "CHANGELOG.md"}
    assert sum(text.count("-m bench.") for text in told.values()) > 40
    assert not {page.name: missing for page, text in told.items() if (missing := not_there(text))}
    assert not not_there("`python -m bench.gpu.cache`. $(PYTHON) -m bench.zoo; python bench/zoo.py")
    planted = "python -m\nbench.gpu.nothing, bench/nothing.py; python -m bench, tests/bench/no.py"
    assert not_there(planted) == ["bench.gpu.nothing", "bench", "bench/nothing.py"]


def test_import_fastres_is_lazy() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fastres; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; print(' '.join(sorted(new)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = {
        "openvino",
        "onnx",
        "triton",
        "numpy",
        "rich",
        "PIL",
        "msgspec",
        "safetensors",
        "typer",
        "matplotlib",
    }
    assert not heavy & set(result.stdout.split())


def test_every_public_name_resolves() -> None:
    import fastres

    for name in fastres.__all__:
        assert getattr(fastres, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fastres.nonsense
