"""What is called of `tensorrt`, held against NVIDIA's own bindings of versions 10 and 11.

The bindings are in the package index, the libraries behind them are not. Over empty libraries of
the same names they can be imported: nothing can be built, but what there is, and what it is called
with, can be read off. `make dev` brings the bindings; see TENSORRT_BINDINGS in the Makefile.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
BINDINGS = sorted((Path(sys.prefix) / "tensorrt-bindings").glob("*"))

# methods that build.py, run.py and fastres/deploy/engine.py call, and with how many arguments
METHODS = {
    "Builder.__init__": 1,
    "Builder.create_network": 1,
    "Builder.create_builder_config": 0,
    "Builder.create_optimization_profile": 0,
    "Builder.build_serialized_network": 2,
    "OnnxParser.__init__": 2,
    "OnnxParser.parse": 1,
    "OnnxParser.get_error": 1,
    "ParserError.desc": 0,
    "ParserError.node_name": 0,
    "IBuilderConfig.set_memory_pool_limit": 2,
    "IBuilderConfig.clear_flag": 1,
    "IBuilderConfig.add_optimization_profile": 1,
    "IBuilderConfig.create_timing_cache": 1,
    "IBuilderConfig.set_timing_cache": 2,
    "IBuilderConfig.get_timing_cache": 0,
    "IOptimizationProfile.set_shape": 4,
    "ITimingCache.serialize": 0,
    "Logger.__init__": 1,
    "Runtime.__init__": 1,
    "Runtime.deserialize_cuda_engine": 1,
    "ICudaEngine.get_tensor_name": 1,
    "ICudaEngine.get_tensor_mode": 1,
    "ICudaEngine.get_tensor_dtype": 1,
    "ICudaEngine.create_engine_inspector": 0,
    "ICudaEngine.create_execution_context": 0,
    "EngineInspector.get_engine_information": 1,
    "IExecutionContext.set_input_shape": 2,
    "IExecutionContext.get_tensor_shape": 1,
    "IExecutionContext.set_tensor_address": 2,
    "IExecutionContext.execute_async_v3": 1,
}
# what is read, set or overridden
NAMES = (
    "OnnxParser.num_errors",
    "IBuilderConfig.profiling_verbosity",
    "IBuilderConfig.progress_monitor",
    "ICudaEngine.num_io_tensors",
    "IExecutionContext.profiler",
    "IProgressMonitor.phase_start",
    "IProgressMonitor.step_complete",
    "IProgressMonitor.phase_finish",
    "IProfiler.report_layer_time",
    "ILogger.log",
    "ILogger.ERROR",
    "ILogger.INTERNAL_ERROR",
    "Logger.ERROR",
    "MemoryPoolType.WORKSPACE",
    "ProfilingVerbosity.DETAILED",
    "BuilderFlag.TF32",
    "LayerInformationFormat.JSON",
    "TensorIOMode.INPUT",
    "TensorIOMode.OUTPUT",
    "nptype",
)
# with NVIDIA's module as the one that would be installed; ours subclass its classes
ASKED = """
import importlib, json, sys
methods, names = json.loads(sys.argv[1])
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt
from fastres.backends.tensorrt import api, build, run
found = api.find_api()
build._logger(trt).log(trt.ILogger.ERROR, "it broke")
monitor, spent = build._monitor(trt, lambda done, of: None), {}
monitor.phase_start("whole", None, 2)
monitor.step_complete("whole", 0)
run._profiler(trt, spent).report_layer_time("layer", 1.5)

def at(name):
    place = trt
    for part in name.split("."):
        place = getattr(place, part, None)
    return place

print(json.dumps({
    "api": str(found), "flags": found.network_flags, "spent": spent,
    "removed": [n for n in ("FP16", "INT8") if not hasattr(trt.BuilderFlag, n)],
    "missing": [name for name in names if at(name) is None],
    "methods": {name: getattr(at(name), "__doc__", None) for name in methods},
}))
"""
Facts = Mapping[str, Any]


def arities(doc: str, method: str) -> set[int]:
    """With how many arguments a method may be called, by the signatures in its docstring."""
    found: set[int] = set()
    pattern = rf"^(?:\d+\. )?{method}\(self: [^,)]*(?P<rest>.*)\) ->"
    for match in re.finditer(pattern, doc, re.MULTILINE):
        given = re.sub(r"<[^>]*>", "default", match["rest"])
        least = len(re.findall(r", \w+: [^,=]*(?=,|$)", given))
        found |= set(range(least, len(re.findall(r", \w+: ", given)) + 1))
    return found


def wrong(methods: Mapping[str, str | None]) -> dict[str, str]:
    """Those that cannot be called as they are, and what is said of them."""
    found = {name: str(doc) for name, doc in methods.items()}
    return {
        name: doc
        for name, doc in found.items()
        if METHODS[name] not in arities(doc, name.rpartition(".")[2])
    }


@pytest.fixture(scope="module")
def facts_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Facts]:
    def facts_of(bindings: Path) -> Facts:
        compiler = shutil.which("gcc")
        if compiler is None:
            pytest.skip("needs gcc, for the empty libraries")
        (major,) = re.findall(r"==(\d+)\.", bindings.name)
        libraries = tmp_path_factory.mktemp("empty")
        for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            file = f"lib{name}.so.{major}"
            flags = ["-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", str(libraries / file)]
            subprocess.run([compiler, *flags, str(HERE / "empty_tensorrt.c")], check=True)
        done = subprocess.run(
            [sys.executable, "-c", ASKED, json.dumps([list(METHODS), NAMES])],
            env={"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(bindings)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    return facts_of


@pytest.mark.skipif(not BINDINGS, reason="no bindings of TensorRT here; make dev brings them")
@pytest.mark.parametrize("bindings", BINDINGS, ids=lambda path: path.name)
def test_everything_that_is_called_is_there(
    bindings: Path, facts_of: Callable[[Path], Facts]
) -> None:
    version = bindings.name.partition("==")[2]
    newest = version.startswith("11.")
    facts = facts_of(bindings)
    assert facts["api"] == f"tensorrt {version}"
    assert facts["missing"] == [] and wrong(facts["methods"]) == {}
    assert facts["spent"] == {"layer": 1.5}
    # what sets the versions apart: 11 has no wishes about precision left, and other numbers
    assert facts["removed"] == (["FP16", "INT8"] if newest else [])
    assert facts["flags"] == (1 if newest else 2)


def test_tensorrt_rtx_too() -> None:
    """But for times of kernels, which it does not keep."""
    trt = importlib.import_module("tensorrt_rtx")
    docs = {}
    for name in METHODS:
        owner, method = name.split(".")
        docs[name] = str(getattr(getattr(trt, owner), method, None).__doc__)
    assert wrong(docs) == {}
    for name in ("num_compute_capabilities", "set_compute_capability"):
        assert hasattr(trt.IBuilderConfig, name)


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("f(self: A) -> int\n\n text f(x)", {0}),
        ("f(self: A, b: int, c: B = <B.ONE: 1>) -> None", {1, 2}),
        (
            "f(*args, **kwargs)\n1. f(self: A, b: int) -> X\n\n2. f(self: A, b: Y, c: Z) -> X",
            {1, 2},
        ),
        ("Nothing of the kind", set()),
    ],
)
def test_signatures_are_read(doc: str, expected: set[int]) -> None:
    assert arities(doc, "f") == expected
