"""The driver: what it says without a GPU, what it asks of a fake one, what it does on a real one.

`fake_cuda.c` is a libcuda.so.1 that runs nothing and writes down what it is asked; Triton's own
launcher and ours run against it in one process (`record_launches.py`).
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.kernels.compiled import driver
from fastres.kernels.compiled.binary import KernelBinary
from fastres.kernels.compiled.build import arguments_of, binary_of
from fastres.kernels.compiled.driver import (
    DriverModule,
    DriverUnavailable,
    encode_tensor_map,
    launch,
)

HERE = Path(__file__).parent
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia"
CASES = runpy.run_path(str(HERE / "driver_cases.py"))["CASES"]
PYTHON_HEADER = Path(sysconfig.get_path("include"), "Python.h")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_says_what_is_missing():
    with pytest.raises(DriverUnavailable, match="driver"):
        driver.use_device(0)
    assert issubclass(DriverUnavailable, RuntimeError)


def test_says_which_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DriverUnavailable, match="pip install 'cuda-bindings>=13.0.3,<14'"):
        driver.cuda_driver()


def test_says_that_there_is_no_gpu(monkeypatch):
    from cuda.bindings import driver as cuda

    monkeypatch.setattr(cuda, "cuInit", lambda flags: (cuda.CUresult.CUDA_ERROR_NO_DEVICE,))
    with pytest.raises(DriverUnavailable, match=r"does not start \(CUDA_ERROR_NO_DEVICE\)"):
        driver.cuda_driver()


@pytest.mark.parametrize(
    ("sm", "runs", "refused"),
    [(80, (80, 86, 89), (75, 90, 120)), (86, (86, 89), (80, 90)), (90, (90,), (80, 100))],
    ids=["sm_80", "sm_86", "sm_90"],
)
def test_which_gpu_runs_what(sm, runs, refused):
    assert all(driver.runs_on(sm, device) for device in runs)
    assert not any(driver.runs_on(sm, device) for device in refused)


def test_small_maps_of_old_drivers_are_patched():
    encoded = bytes(8) + (1 << 21 | 5).to_bytes(8, "little") + bytes(range(112))
    mended = bytes(8) + (5).to_bytes(8, "little") + bytes(range(112))
    assert driver.patched(encoded, 131_070, 13010) == mended
    assert driver.patched(encoded, 131_071, 13010) == encoded
    assert driver.patched(encoded, 100, 13020) == encoded


@pytest.fixture(scope="module", params=[13010, 13020])
def recorded(request, tmp_path_factory):
    """What was asked of a fake driver of that version: by launch, by Triton and by us."""
    if request.param <= 13010 and "13010" not in (NVIDIA / "driver.c").read_text():
        pytest.skip(f"Triton {triton.__version__} does not patch the maps of old drivers")
    compiler = shutil.which("gcc")
    if compiler is None or not PYTHON_HEADER.exists():
        pytest.skip("needs gcc and Python.h, as Triton's launcher itself does")
    folder = tmp_path_factory.mktemp("fake_cuda")
    library = folder / "libcuda.so.1"
    flags = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-I", str(NVIDIA / "include")]
    subprocess.run([compiler, *flags, str(HERE / "fake_cuda.c"), "-o", str(library)], check=True)
    log = folder / "log"
    log.touch()
    environment = {
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(tmp_path_factory.getbasetemp() / "triton"),
        "FAKE_CUDA_LOG": str(log),
        "FAKE_CUDA_VERSION": str(request.param),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "record_launches.py")],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.compile
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_asks_of_the_driver_what_triton_asks(recorded, name):
    """The same machine code, tensor maps, grid, attributes and parameters, byte by byte.

    But for one: Triton allows a kernel all the shared memory there is, we what it asks for.
    """
    triton_asks, we_ask = (
        [line for line in recorded[name][who] if not line.startswith("allow")]
        for who in ("triton", "ours")
    )
    assert we_ask == triton_asks
    assert not any("misaligned" in line for line in we_ask)
    kinds = [line.split()[0] for line in we_ask]
    assert kinds.count("load") == kinds.count("launch") == 1
    assert kinds.count("encode") == {"box": 2, "boxes": 3}.get(name.split("-")[0], 0)
    if name == "conv2d":
        asked = [line for line in recorded[name]["ours"] if line.startswith("allow")]
        assert asked == ["allow attribute 8 value 73728"] and "shared 73728" in " ".join(we_ask)
    assert any("attribute 6 1" in line for line in we_ask) == (name == "box-copy-dependent")


@pytest.mark.compile
def test_launches_clusters(recorded):
    allowed, asked = recorded["clusters"]
    assert allowed == "allow attribute 14 value 1"  # NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    assert "grid 48 1 1 block 128 1 1" in asked
    # dependent, cooperative, cluster dimension, scheduling policy: spread
    assert asked.endswith("attribute 6 1 attribute 2 1 attribute 4 16 1 1 attribute 5 1")


@pytest.mark.compile
def test_refuses_what_the_gpu_cannot_run(recorded):
    said = recorded["refusals"]
    assert "ValueError: _box_copy_kernel was compiled for sm_100, GPU 0 is an" in said["target"]
    assert "300000 bytes of shared memory, GPU 0 has 232448" in said["shared memory"]
    assert "DriverUnavailable: device is 1, expected one of" in said["device"]


def test_refuses_arguments_of_other_sizes():
    header = runpy.run_path(str(HERE / "test_binary.py"))["HEADER"]
    with pytest.raises(ValueError, match=r"_kernel was given arguments of \[8\] bytes, expected"):
        launch(header, None, [bytes(8)], 1)


def gpu_sm() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def result_of(call) -> torch.Tensor:
    output = call.arguments.get("y_ptr", call.arguments.get("y_desc"))
    return output.base if isinstance(output, TensorDescriptor) else output


def run_through_driver(call) -> None:
    """Compiles, saves, unpacks, loads and launches on torch's current stream."""
    built = binary_of(call, gpu_sm())
    binary = KernelBinary.from_parts(built.to_json(), built.cubin)
    arguments = arguments_of(call, binary, encode=encode_tensor_map)
    stream = torch.cuda.current_stream().cuda_stream
    launch(binary.header, DriverModule(binary).function(), arguments, call.programs, stream)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_jit_bit_for_bit(case):
    by_jit, by_driver = case.launch("cuda"), case.launch("cuda")
    if gpu_sm() < 90 and "box" in case.name:
        pytest.skip("descriptors need sm_90")
    for call in (by_jit, by_driver):
        result_of(call).fill_(float("nan"))
    by_jit.run()
    run_through_driver(by_driver)
    torch.cuda.synchronize()
    expected, found = result_of(by_jit), result_of(by_driver)
    assert not found.isnan().any()
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.gpu
def test_is_recorded_into_a_cuda_graph():
    call = next(case.launch("cuda") for case in CASES if case.name == "max-pool")
    call.run()
    expected = result_of(call).clone()
    binary = binary_of(call, gpu_sm())
    function = DriverModule(binary).function()
    arguments = arguments_of(call, binary, encode=encode_tensor_map)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        launch(binary.header, function, arguments, call.programs, stream)
    result_of(call).fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result_of(call), expected)
