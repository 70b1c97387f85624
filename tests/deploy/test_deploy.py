"""fastres.deploy: no PyTorch is imported, and what is loaded is what was saved, or refused.

There is no GPU here: pycuda and TensorRT's runtime are stand-ins, memory is the CPU's. The saved
engines are real ones, built by tensorrt_rtx.
"""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastres
from fastres import deploy
from fastres.artifact.container import MANIFEST, SEAL, seal
from fastres.backends.tensorrt import api
from fastres.backends.tensorrt.api import find_builder
from fastres.backends.tensorrt.stored import ABOUT, PLAN
from fastres.errors import ArtifactError, BackendUnavailable, InputError, OutOfMemory

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, images: Tensor) -> Path:
    model = fastres.models.settle(fastres.models.cifar_resnet(8, seed=0), images)
    engine = fastres.compile(model, images[:1], backend="tensorrt", target="sm_86")
    path = tmp_path_factory.mktemp("deploy") / "engine.fastres"
    engine.save(path)
    return path


def test_pytorch_is_not_imported(saved: Path) -> None:
    """Neither by the module nor on the way to the driver."""
    program = (
        "import sys, fastres\n"
        "try:\n"
        f"    fastres.deploy.load({str(saved)!r}, trust_engine=True)\n"
        "except fastres.errors.BackendUnavailable as error:\n"
        "    print(error)\n"
        "print([name for name in ('torch', 'triton', 'onnx', 'openvino') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reason, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert torch.cuda.is_available() or "pycuda" in reason or "driver" in reason


class Execution:
    """y = 3 x, whatever the network was."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.shape, self.addresses = gpu, (), {}

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self.shape = shape
        return True

    def get_tensor_shape(self, name: str) -> Any:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, handle: int) -> bool:
        count = int(np.prod(self.shape))
        x, y = ((ctypes.c_float * count).from_address(a) for a in self.addresses.values())
        np.frombuffer(y, "f4")[:] = 3 * np.frombuffer(x, "f4")
        return self.gpu.works


class CudaError(Exception):
    """pycuda.driver.Error, of which its other errors are kinds."""


class NoRoom(CudaError):
    """pycuda.driver.MemoryError."""


class Gpu:
    """What pycuda and TensorRT say there is."""

    def __init__(self) -> None:
        self.name, self.capability, self.depth = "NVIDIA RTX A5000", (8, 6), 0
        self.room, self.works, self.takes, self.contexts = 2**30, True, True, 1
        self.kept: list[Any] = []
        self.fails: dict[str, CudaError] = {}  # by the call

    def does(self, call: str, result: Any = None) -> Any:
        if call in self.fails:
            raise self.fails[call]
        return result

    def allocate(self, size: int) -> int:
        assert self.depth == 1, "not in the GPU's context"
        if size > self.room:
            raise NoRoom("cuMemAlloc failed: out of memory")
        self.kept.append(np.full(size, 0x7F, np.uint8))
        return int(self.kept[-1].ctypes.data)

    def copy_in(self, to: int, array: Any, stream: Any) -> None:
        self.does("memcpy_htod_async")
        ctypes.memmove(to, array.ctypes.data, array.nbytes)

    def copy_out(self, array: Any, of: int, stream: Any) -> None:
        self.does("memcpy_dtoh_async")
        ctypes.memmove(array.ctypes.data, of, array.nbytes)

    def push(self) -> None:
        self.does("push")
        self.depth += 1

    def pop(self) -> None:
        self.depth -= 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    device = SimpleNamespace(
        compute_capability=lambda: gpu.capability,
        name=lambda: gpu.name,
        retain_primary_context=lambda: gpu.does("retain_primary_context", gpu),
    )
    stream = SimpleNamespace(handle=5, synchronize=lambda: gpu.does("synchronize"))
    cuda: Any = ModuleType("pycuda.driver")
    cuda.init = lambda: None
    cuda.Error, cuda.MemoryError = CudaError, NoRoom
    cuda.Device = lambda number: device
    cuda.Device.count = lambda: 1
    cuda.Stream = lambda: gpu.does("Stream", stream)
    cuda.mem_alloc, cuda.memcpy_htod_async = gpu.allocate, gpu.copy_in
    cuda.memcpy_dtoh_async = gpu.copy_out
    package: Any = ModuleType("pycuda")
    package.driver = cuda
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", cuda)

    engine = SimpleNamespace(
        num_io_tensors=2,
        get_tensor_name=lambda i: ["x", "fc"][i],
        get_tensor_dtype=lambda name: "f4",
        create_execution_context=lambda: Execution(gpu) if gpu.contexts else None,
    )

    def logger(level: Any) -> None:
        return None

    logger.ERROR = 1  # type: ignore[attr-defined]
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: engine if gpu.takes else None)
    module = SimpleNamespace(
        Logger=logger, Runtime=lambda log: runtime, nptype=lambda kind: np.dtype(kind)
    )

    def fake(builder: str) -> Any:
        name, version = builder.split()
        return deploy.engine.Api(module, name, tuple(map(int, version.split("."))))

    monkeypatch.setattr(deploy.engine, "find_builder", fake)
    return gpu


def images_of(n: int) -> Any:
    return np.random.default_rng(n).normal(size=(n, 3, 64, 64)).astype("f4")


def test_arrays_in_arrays_out(saved: Path, gpu: Gpu) -> None:
    engine = deploy.load(saved, trust_engine=True)
    assert engine.ranges["x"].smallest == (1, 3, 64, 64) and gpu.depth == 0
    for n in (1, 5, 32):
        x = images_of(n)
        assert np.array_equal(engine(x), 3 * x)
        assert np.array_equal(engine(x[:, :, ::-1]), 3 * x[:, :, ::-1])  # no matter how it lies
    assert gpu.depth == 0


def test_threads_wait_for_each_other(saved: Path, gpu: Gpu) -> None:
    engine, wrong = deploy.load(saved, trust_engine=True), []

    def call(n: int) -> None:
        x = images_of(n)
        for _ in range(20):
            if not np.array_equal(engine(x), 3 * x):
                wrong.append(n)

    threads = [threading.Thread(target=call, args=(n,)) for n in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class TestInputs:
    @pytest.mark.parametrize(
        ("x", "text"),
        [
            (np.zeros((33, 3, 64, 64), "f4"), r"x is \[33, 3, 64, 64\]; the engine takes \[1, 3"),
            (np.zeros((0, 3, 64, 64), "f4"), "the engine takes"),
            (np.zeros((1, 3, 63, 64), "f4"), "the engine takes"),
            (np.zeros((3, 64, 64), "f4"), "the engine takes"),
            (np.zeros((1, 3, 64, 64)), "x is float64; give an array of float32"),
            ([1, 2], "x is list"),
            (np.ma.zeros((1, 3, 64, 64), "f4"), "x is MaskedArray; give an array of float32"),
            (None, "x is NoneType"),
        ],
    )
    def test_what_does_not_fit(self, saved: Path, gpu: Gpu, x: Any, text: str) -> None:
        with pytest.raises(InputError, match=text):
            deploy.load(saved, trust_engine=True)(x)

    def test_too_many(self, saved: Path, gpu: Gpu) -> None:
        with pytest.raises(InputError, match="2 inputs, the engine takes x"):
            deploy.load(saved, trust_engine=True)(images_of(1), images_of(1))

    def test_no_room_and_the_next_smaller_call_works(self, saved: Path, gpu: Gpu) -> None:
        engine = deploy.load(saved, trust_engine=True)
        gpu.room = images_of(2).nbytes
        with pytest.raises(OutOfMemory, match="no room for x"):
            engine(images_of(3))
        assert engine(images_of(2)).shape == (2, 3, 64, 64) and gpu.depth == 0

    def test_a_run_that_fails(self, saved: Path, gpu: Gpu) -> None:
        engine = deploy.load(saved, trust_engine=True)
        gpu.works = False
        with pytest.raises(BackendUnavailable, match="could not run"):
            engine(images_of(1))
        assert gpu.depth == 0


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (CudaError("an illegal address"), BackendUnavailable, "GPU 0 could not .*illegal address"),
        (NoRoom("out of memory"), OutOfMemory, "GPU 0 has no room to .*: out of memory"),
    ],
)
class TestFailures:
    """pycuda's errors are ours, and the context is left."""

    @pytest.mark.parametrize("call", ["retain_primary_context", "push", "Stream"])
    def test_of_loading(
        self, saved: Path, gpu: Gpu, call: str, error: CudaError, kind: Any, text: str
    ) -> None:
        gpu.fails[call] = error
        with pytest.raises(kind, match=text):
            deploy.load(saved, trust_engine=True)
        assert gpu.depth == 0

    @pytest.mark.parametrize(
        "call", ["push", "memcpy_htod_async", "memcpy_dtoh_async", "synchronize"]
    )
    def test_of_a_run_and_the_next_works(
        self, saved: Path, gpu: Gpu, call: str, error: CudaError, kind: Any, text: str
    ) -> None:
        engine = deploy.load(saved, trust_engine=True)
        gpu.fails[call] = error
        with pytest.raises(kind, match=text):
            engine(images_of(1))
        gpu.fails.clear()
        assert engine(images_of(1)).shape == (1, 3, 64, 64) and gpu.depth == 0


class TestRefusals:
    def test_untrusted(self, saved: Path, gpu: Gpu) -> None:
        with pytest.raises(ArtifactError, match="pass trust_engine=True"):
            deploy.load(saved)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"capability": (8, 9)}, r"built for a GPU \(sm_86\), GPU 0 is .* \(sm_89\)"),
            ({"takes": False}, "does not take this engine"),
        ],
    )
    def test_another_gpu(self, saved: Path, gpu: Gpu, change: Any, text: str) -> None:
        vars(gpu).update(change)
        with pytest.raises(BackendUnavailable, match=text):
            deploy.load(saved, trust_engine=True)
        assert gpu.depth == 0

    def test_no_context(self, saved: Path, gpu: Gpu) -> None:
        gpu.contexts = 0
        with pytest.raises(OutOfMemory):
            deploy.load(saved, trust_engine=True)

    def test_another_version(self, saved: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
        rtx: Any = ModuleType("tensorrt_rtx")
        rtx.__version__ = "1.0.2"
        monkeypatch.setattr(deploy.engine, "find_builder", find_builder)
        monkeypatch.setattr(api, "_load", lambda name: api.Api(rtx, name, (1, 0, 2)))
        text = r"built by (tensorrt_rtx (.*)), here is tensorrt_rtx 1.0.2: pip install tensorrt-rtx"
        with pytest.raises(BackendUnavailable, match=text):
            deploy.load(saved, trust_engine=True)

    def test_no_such_gpu(self, saved: Path, gpu: Gpu) -> None:
        with pytest.raises(BackendUnavailable, match="there is no GPU 3: there are 1"):
            deploy.load(saved, trust_engine=True, device=3)

    @pytest.mark.parametrize("given", [{"device": -1}, {"device": True}, {"trust_engine": 1}])
    def test_bad_arguments(self, saved: Path, given: Any) -> None:
        with pytest.raises(InputError):
            deploy.load(saved, **{"trust_engine": True, **given})

    def test_an_engine_without_a_plan(self, tmp_path: Path, images: Tensor) -> None:
        model = fastres.models.cifar_resnet(8, seed=0).eval()
        fastres.compile(model, images[:1], backend="cpu").save(tmp_path / "e")
        with pytest.raises(ArtifactError, match="holds neither a TensorRT plan nor"):
            deploy.load(tmp_path / "e", trust_engine=True)

    def test_no_driver(self, saved: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> None:
            raise CudaError("cuInit failed: no CUDA-capable device is detected")

        monkeypatch.setattr(sys.modules["pycuda.driver"], "init", fail)
        with pytest.raises(BackendUnavailable, match="no usable NVIDIA driver"):
            deploy.load(saved, trust_engine=True)


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path: Path, images: Tensor, saved: Path) -> Path:
        fastres.load(saved, target="sm_86").save(tmp_path / "e")
        return tmp_path / "e"

    @pytest.mark.parametrize("name", [ABOUT, PLAN, "manifest.json"])
    def test_a_changed_byte(self, folder: Path, gpu: Gpu, name: str) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(ArtifactError):
            deploy.load(folder, trust_engine=True)

    @pytest.mark.parametrize("name", [ABOUT, PLAN, "manifest.json", "manifest.sha256"])
    def test_a_file_is_missing(self, folder: Path, gpu: Gpu, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(ArtifactError, match=re.escape(f"{folder}: ")):
            deploy.load(folder, trust_engine=True)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"schema": 99}, "written by schema 99, this fastres .* reads up to 2: upgrade"),
            ({"schema": 0}, "says schema 0"),
            ({"format": "other"}, "manifest.json is not fastres's"),
            ({"format": None}, "manifest.json is not fastres's"),
            ({"options": {}}, "manifest.json cannot be read"),
            ({"files": {}}, r"lists \[\]; it should list"),
        ],
    )
    def test_a_manifest_of_another_kind(
        self, folder: Path, gpu: Gpu, change: dict[str, Any], text: str
    ) -> None:
        """Sealed as a whole; fastres.load refuses the same."""
        reseal(folder, lambda manifest: manifest.update(change))
        for load in (deploy.load, fastres.load):
            with pytest.raises(ArtifactError, match=text):
                load(folder, trust_engine=True)

    @pytest.mark.parametrize("name", [PLAN, "weights.safetensors"])
    def test_another_size(self, folder: Path, gpu: Gpu, name: str) -> None:
        """Of those files too that are not read."""
        reseal(folder, lambda manifest: manifest["files"][name].update(size=1))
        with pytest.raises(ArtifactError, match=rf"{name} has \d+ bytes, 1 were written"):
            deploy.load(folder, trust_engine=True)

    def test_a_stranger(self, folder: Path, gpu: Gpu) -> None:
        (folder / "more.py").write_text("x")
        with pytest.raises(ArtifactError, match="more.py is no part of it"):
            deploy.load(folder, trust_engine=True)

    @pytest.mark.parametrize("name", [ABOUT, PLAN])
    def test_half_of_a_plan(self, folder: Path, gpu: Gpu, name: str) -> None:
        """The manifest does not list it: what says so knows no paths, and the engine is named."""
        (folder / name).unlink()
        reseal(folder, lambda manifest: manifest["files"].pop(name))
        text = re.escape(f"{folder}: {name} is missing. Copy the engine anew")
        for load in (deploy.load, partial(fastres.load, target="sm_86")):
            with pytest.raises(ArtifactError, match=text):
                load(folder, trust_engine=True)

    def test_truncated(self, saved: Path, gpu: Gpu, tmp_path: Path) -> None:
        data = saved.read_bytes()
        for size in (0, 10, len(data) // 2, len(data) - 1):
            (tmp_path / "t.fastres").write_bytes(data[:size])
            with pytest.raises(ArtifactError):
                deploy.load(tmp_path / "t.fastres", trust_engine=True)

    @pytest.mark.parametrize("path", ["/no/such/engine", 3, None, "\0", ""])
    def test_no_engine_at_all(
        self, path: Any, folder: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder)  # "" is not the current folder
        with pytest.raises(ArtifactError):
            deploy.load(path, trust_engine=True)


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest of an engine and makes its digest fit."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    text = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / SEAL).write_bytes(seal(text))


def test_the_description_can_be_read_by_anybody(saved: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(saved, tmp_path, "zip")
    about = json.loads((tmp_path / ABOUT).read_text())
    assert about["origin"]["architecture"] == "sm_86" and len(about["layers"]) >= 8
