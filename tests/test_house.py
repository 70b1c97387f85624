"""The house rules: who may import whom, and what an import may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"fastres": "fastres", "kernels": "fastres.kernels", "calib": "fastres.calib"}
SOURCES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))

# A module may import from its own floor and from those below it.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("fastres.wording",),
    ("fastres.kernels",),
    ("fastres.calib",),
    (
        "fastres.errors",
        "fastres.deadlines",
        "fastres.streams",
        "fastres.tolerances",
        "fastres.text",
        "fastres.settling",
        "fastres.blocks",
    ),
    ("fastres.options", "fastres.models"),
    (
        "fastres.weights",
        "fastres.checkpoint_files",
        "fastres.checkpoint_pickles",
        "fastres.checkpoint_zips",
        "fastres.checkpoints",
        "fastres.graph",
    ),
    ("fastres.backends",),
    (
        *("fastres.engine", "fastres.engine_info", "fastres.engine_inputs"),
        *("fastres.engine_allowance", "fastres.engine_tracing", "fastres.predicting"),
        *("fastres.engine_parts", "fastres.engine_running"),
    ),
    (
        "fastres.artifact",
        "fastres.container",
        "fastres.manifest",
        "fastres.preprocess_entry",
        "fastres.oracle",
        "fastres.other_dtypes",
        "fastres.references",
        "fastres.parity",
        "fastres.parity_layers",
        "fastres.parity_report",
        "fastres.profiling",
        "fastres.summaries",
        "fastres.timing",
        "fastres.building",
        "fastres.compiler",
        "fastres.source",
        "fastres.calibrating",
        "fastres.calibration_data",
        "fastres.data_kinds",
        "fastres.image_noise",
        "fastres.table_search",
        "fastres.quantizing",
        "fastres.exporting",
        "fastres.deploy",
        "fastres.deploy_triton",
        "fastres.deploy_plans",
        "fastres.deploy_weights",
        "fastres.installed",
    ),
    ("fastres.report",),
    ("fastres.cli",),
    ("fastres.__main__",),
)
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
}
TRITON_FREE = (
    "__init__",
    "binary",
    "cost",
    "device_memory",
    "driver",
    "epilogue",
    "folding",
    "geometry",
    "reference",
    "stem_pool_tiles",
    "tensor_map",
    "tiles",
)


def module_of(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = [FOLDERS[folder], *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, *, top_level_only: bool = False) -> list[str]:
    """Every module that a file imports, those under `if TYPE_CHECKING` left out."""
    tree = ast.parse(path.read_text())
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
            found.extend(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def floor_of(module: str) -> int | None:
    matches = [
        (len(prefix), i)
        for i, floor in enumerate(FLOORS)
        for prefix in floor
        if module == prefix or module.startswith(prefix + ".")
    ]
    return max(matches)[1] if matches else None


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_point_downwards(path: Path) -> None:
    module = module_of(path)
    if module == "fastres":
        return  # the public face imports everything, lazily
    own = floor_of(module)
    assert own is not None, f"{module} stands on no floor: add it to FLOORS"
    for name in imports_of(path, top_level_only=True):
        target = floor_of(name)
        assert target is None or target <= own, f"{module} imports {name}, which is above it"


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


def test_data_parts_of_the_kernels_import_no_triton() -> None:
    for stem in TRITON_FREE:
        names = imports_of(ROOT / "kernels" / f"{stem}.py")
        assert not any(name.split(".")[0] == "triton" for name in names), stem


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_files_are_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400, "would a reader know their way in it?"


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
