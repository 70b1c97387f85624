"""fastres.deploy with machine code: the bytes that PyTorch's runner would give the driver.

Weights, inputs and the parameters of every launch are compared in the same memory; what kernels
make of them only a GPU can show.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import fastres
from fastres import deploy
from fastres.artifact import container
from fastres.artifact.container import MANIFEST, SEAL
from fastres.artifact.manifest import WEIGHTS
from fastres.backends.triton.planning.plan import LoadInput, Norm, Place, Plan
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.running.run_driver import DriverRunner
from fastres.backends.triton.shipping.stored import PLANS
from fastres.backends.triton.shipping.stored_kernels import CODE, KERNELS, read_code
from fastres.deploy import plans as deploy_plans
from fastres.deploy import triton as deploy_triton
from fastres.deploy.triton import TritonEngine, as_stored
from fastres.deploy.weights import PackedArrays, bf16
from fastres.errors import ArtifactError, BackendUnavailable, InputError
from fastres.graph.ir import Graph
from fastres.kernels.folding import packed_shape

CPU = torch.device("cpu")
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
compiles = [
    pytest.mark.compile,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter turns the compiler off"
    ),
]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


class TestWeights:
    CONSTANTS = {
        "w": draw(8, 6, 3, 3),
        "p": draw(8, 4, 1, 1),
        "g": draw(16, 2, 3, 3),
        "s": draw(5, 3, 7, 7),
        "l": draw(7, 9),
        "q": torch.randint(-127, 128, (8, 6, 3, 3), dtype=torch.int8),
        "i": torch.randint(-127, 128, (32, 6, 3, 3), dtype=torch.int8),
        "j": torch.randint(-127, 128, (32, 4, 1, 1), dtype=torch.int8),
        "b": draw(8),
        "c": draw(8) * 1e-3,
        "m": draw(8) + 1,
        "v": draw(8).abs() + 0.1,
    }

    @pytest.mark.parametrize("precision", DTYPES)
    @pytest.mark.parametrize(
        "key",
        [
            ("filters", "w"),
            ("filters", "q"),
            ("matrix", "w"),
            ("matrix", "w", "p"),
            ("interleaved", "i"),
            ("interleaved", "i", "j"),
            ("grouped", "g", 8, 4),
            ("stem", "s"),
            ("rows", "l"),
            ("bias", "b"),
            ("bias", "b", "c"),
            ("bias", "b", "c", 41.3),
            ("products", "v", 0.0371),
            ("products", "v", 0.0371, 1 / 0.0219),
            ("factors", 0.1, 0.2, 0.3, -1.0, -2.0, 3e-7),
        ],
        ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else str(x),
    )
    def test_bits_are_those_of_pytorch(self, precision: str, key: Any) -> None:
        graph, tf32 = Graph((), (), (), self.CONSTANTS, ""), precision == "tf32"
        packed = Packed(graph, DTYPES[precision], CPU, tf32=tf32)
        arrays = PackedArrays(lambda name: self.CONSTANTS[name].numpy(), precision)
        if key[0] == "matrix" and len(key) == 2:
            wanted = packed.matrix(key[1])
        else:
            wanted = packed.get(key)
        found = arrays.get(key)
        assert found.shape == tuple(wanted.shape) and found.tobytes() == raw(wanted)

    @pytest.mark.parametrize("affine", [False, True])
    def test_batch_norms_too(self, affine: bool) -> None:
        norm = Norm("m", "v", "b" if affine else None, "c" if affine else None, 1e-5)
        packed = Packed(Graph((), (), (), self.CONSTANTS, ""), torch.float16, CPU)
        arrays = PackedArrays(lambda name: self.CONSTANTS[name].numpy(), "fp16")
        key = (norm.mean, norm.var, norm.weight, norm.bias, norm.eps)
        for kind, wanted in zip(("scale", "shift"), packed.scale_and_shift(norm), strict=True):
            found = torch.from_numpy(arrays.get((kind, *key)))
            torch.testing.assert_close(found, wanted, rtol=2e-7, atol=0)  # of rsqrt: a last bit

    def test_bfloat16_rounds_to_even_and_keeps_nan(self) -> None:
        odd = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1e-40, 3.4e38, float("inf"), -0.0])
        values = torch.cat([odd, draw(1000)])
        assert bf16(values.numpy()).tobytes() == raw(values.bfloat16())
        nan = torch.from_numpy(bf16(np.float32([np.nan, -np.nan]))).view(torch.bfloat16)
        assert bool(nan.isnan().all())

    @pytest.mark.parametrize(
        "key", [(), ("__init__", "w"), ("get", "w"), ("stem", "l"), ("rows",), ("interleaved", "q")]
    )
    def test_keys_that_are_none(self, key: Any) -> None:
        arrays = PackedArrays(lambda name: self.CONSTANTS[name].numpy(), "fp16")
        with pytest.raises(ArtifactError, match="the plan reads"):
            arrays.get(key)


class TestInputs:
    @pytest.mark.parametrize("folded", [False, True])
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "tf32", "int8"])
    def test_bits_are_those_of_pytorch(self, folded: bool, dtype: str) -> None:
        x = 3 * draw(2, 3, 8, 12)
        x[0, 0, 0, :3] = torch.tensor([0.5, 1.5, 900.0]) * 0.02
        shape = packed_shape(2, 8, 12) if folded else (2, 8, 12, 3)
        dtype, tf32 = ("float32", True) if dtype == "tf32" else (dtype, False)
        wanted = torch.full(shape, 99, dtype=getattr(torch, dtype))
        scale = 0.02 if dtype == "int8" else None
        step = LoadInput("x", "x", "x", folded=folded, scale=scale)
        place: Any = Place(shape, dtype, 0, tf32)
        runner = object.__new__(DriverRunner)
        runner.plan = Plan((), {"x": place}, (), (), 0)
        runner.load(step, x, wanted)
        assert tf32 == (dtype == "float32" and not (wanted.view(torch.int32) & 0x1FFF).any())
        assert as_stored(x.numpy(), place, folded=folded, scale=scale).tobytes() == raw(wanted)


class FakeGpu:
    """Memory that PyTorch's runner has as well, asked for in the same order."""

    def __init__(self, driver: Any, addresses: Sequence[int]) -> None:
        self.driver = driver
        self.addresses = list(addresses)
        self.encode, self.launch = driver.encode, driver.launch

    def allocate(self, size: int) -> int:
        return self.addresses.pop(0)

    def write(self, address: int, array: Any) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def read(self, array: Any, address: int) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def wait(self) -> None:
        pass


class Twins:
    """The same plan in PyTorch's runner and deployed, over the same memory."""

    def __init__(self, saved: Any, fake_driver: Any) -> None:
        graph = saved.engine.graph
        self.constants = Packed(graph, torch.float16, CPU)
        self.theirs = fake_driver(list(saved.code.kernels.values()))
        self.linked = saved.code.plans[0]
        self.runner = DriverRunner(saved.plan, self.linked, self.theirs, self.constants, CPU)
        with self.runner.context() as context:
            self.arena = context.arena
        self.weights = {key: self.constants.get(key) for key in self.linked.keys()}
        self.before = {key: raw(tensor) for key, tensor in self.weights.items()}
        addresses = [tensor.data_ptr() for tensor in self.weights.values()]
        self.ours = fake_driver(list(saved.code.kernels.values()))
        plans = msgspec.json.decode(saved.files[PLANS], type=deploy_plans.Plans).plans
        self.engine = TritonEngine(
            saved.code,
            plans,
            lambda name: graph.constants[name].numpy(),
            "fp16",
            FakeGpu(self.ours, [*addresses, self.arena.data_ptr()]),
        )


@pytest.mark.parametrize("name", ["cifar", "bottleneck"])
class TestEngine:
    pytestmark = compiles

    @pytest.fixture
    def twins(self, name: str, fake_driver: Any, request: pytest.FixtureRequest) -> Twins:
        return Twins(request.getfixturevalue(name), fake_driver)

    def test_the_driver_gets_the_same(self, twins: Twins) -> None:
        """Kernels, grids and every byte of their parameters; weights and inputs in memory."""
        assert {key: raw(tensor) for key, tensor in twins.weights.items()} == twins.before
        x = draw(*twins.runner.plan.input_shapes[0])
        twins.arena.fill_(77)
        twins.runner.run([x])
        wanted = raw(twins.arena)
        twins.arena.fill_(77)
        twins.engine(x.numpy())
        assert raw(twins.arena) == wanted
        assert twins.ours.launched == twins.theirs.launched != []

    def test_outputs_are_read_where_they_lie(self, twins: Twins) -> None:
        plan = twins.runner.plan
        ((name, shape),) = plan.outputs
        made = draw(*shape).half()
        start = plan.places[name].offset

        def launch(*given: Any) -> None:
            twins.arena[start : start + made.nbytes] = made.view(torch.uint8).flatten()

        twins.engine._gpu.launch = launch  # type: ignore[method-assign]
        x = draw(*plan.input_shapes[0]).numpy()
        found = twins.engine(x)
        assert found.dtype == np.float32 and np.array_equal(found, made.float().numpy())
        assert np.array_equal(twins.engine(x[:1]), made.float().numpy()[:1])  # fewer images

    def test_what_does_not_fit(self, twins: Twins) -> None:
        (shape,) = twins.runner.plan.input_shapes
        n, c, h, w = shape
        good = np.zeros(shape, np.float32)
        (shapes,) = twins.engine.ranges.values()
        assert (shapes.smallest, shapes.largest) == ((1, c, h, w), shape)
        for bad in (
            good.astype(np.float64),
            good[:, :2],
            np.zeros((n + 1, c, h, w), np.float32),
            good[:0],
            good[0],
            np.ma.masked_array(good),
            [1],
            None,
        ):
            with pytest.raises(InputError, match=r"the engine takes float32\["):
                twins.engine(bad)
        with pytest.raises(InputError):
            twins.engine(good, good)
        with pytest.raises(InputError, match="none"):
            twins.engine()


@pytest.fixture(scope="module")
def folder(cifar: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deployed") / "e"
    cifar.engine.save(path)
    return Path(path)


class TestSaved:
    pytestmark = compiles

    def test_neither_pytorch_nor_triton_is_imported(self, folder: Path) -> None:
        program = (
            "import sys, fastres\n"
            "try:\n"
            f"    fastres.deploy.load({str(folder)!r}, trust_engine=True)\n"
            "except fastres.errors.BackendUnavailable as error:\n"
            "    print(str(error).splitlines()[0])\n"
            "print([n for n in ('torch', 'triton', 'onnx', 'openvino') if n in sys.modules])\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"
        if not torch.cuda.is_available():
            assert "driver" in done.stdout or "cuda" in done.stdout

    def test_from_the_file_to_the_launches(
        self, folder: Path, fake_driver: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held: list[Any] = []

        class Gpu(FakeGpu):
            def __init__(self, kernels: Any, device: int) -> None:
                super().__init__(fake_driver(kernels), [])

            def allocate(self, size: int) -> int:
                held.append(np.zeros(size + 16, np.uint8))
                return -(-int(held[-1].ctypes.data) // 16) * 16

        monkeypatch.setattr(deploy_triton, "CudaGpu", Gpu)
        engine = deploy.load(folder, trust_engine=True)
        assert engine(np.zeros((2, 3, 16, 16), np.float32)).shape == (2, 10)

    def test_untrusted(self, folder: Path) -> None:
        with pytest.raises(ArtifactError, match="pass trust_engine=True"):
            deploy.load(folder)

    @pytest.mark.parametrize("file", [KERNELS, CODE, PLANS, "graph.json", "weights.safetensors"])
    def test_a_changed_byte(self, folder: Path, tmp_path: Path, file: str) -> None:
        import shutil

        shutil.copytree(folder, tmp_path / "e")
        data = bytearray((folder / file).read_bytes())
        data[len(data) // 3] ^= 1
        (tmp_path / "e" / file).write_bytes(data)
        with pytest.raises(ArtifactError, match="was altered"):
            deploy.load(tmp_path / "e", trust_engine=True)

    @pytest.mark.parametrize(
        ("gone", "text"),
        [(PLANS, f"{PLANS} is missing"), (CODE, "belong together; one is missing")],
    )
    def test_a_file_that_is_not_listed(
        self, folder: Path, tmp_path: Path, gone: str, text: str
    ) -> None:
        """What says so knows no paths: the engine is named all the same."""
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != gone}
        manifest = msgspec.json.decode(files[MANIFEST])
        del manifest["files"][gone]
        files[MANIFEST] = msgspec.json.encode(manifest)
        container.write(tmp_path / "e", {**files, SEAL: container.seal(files[MANIFEST])})
        with pytest.raises(ArtifactError, match=rf"{re.escape(str(tmp_path / 'e'))}: .*{text}"):
            deploy.load(tmp_path / "e", trust_engine=True)

    def test_a_type_that_numpy_has_not(self, folder: Path) -> None:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        halves = {"x": torch.zeros(1, dtype=torch.bfloat16)}
        files[WEIGHTS] = safetensors.torch.save(halves)
        with pytest.raises(ArtifactError, match=f"{WEIGHTS} holds 'BF16', a type that NumPy"):
            deploy_triton.load_triton(files, "fp16", 0)

    def test_without_a_driver(self, folder: Path) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        with pytest.raises(BackendUnavailable):
            deploy.load(folder, trust_engine=True)

    def test_plans_and_code_that_do_not_go_together(self, cifar: Any, fake_driver: Any) -> None:
        plans = msgspec.json.decode(cifar.files[PLANS], type=deploy_plans.Plans).plans
        graph, code = cifar.engine.graph, read_code(cifar.files)
        assert code is not None
        room = np.zeros(2**22, np.uint8)
        everything = int(room.ctypes.data)

        def engine(plans: Any) -> Any:
            gpu = FakeGpu(fake_driver(list(code.kernels.values())), [everything] * 99)
            return TritonEngine(
                code, plans, lambda name: graph.constants[name].numpy(), "fp16", gpu
            )

        assert engine(plans)
        other = msgspec.structs.replace(plans[0], input_shapes=((9, 3, 16, 16),))
        with pytest.raises(ArtifactError, match="of different plans"):
            engine([other])
        small = msgspec.structs.replace(plans[0], arena_bytes=64)
        with pytest.raises(ArtifactError, match="launch 0 is given"):
            engine([small])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_it_computes_what_the_engine_does(
    net: Any, images: Tensor, tmp_path: Path
) -> None:
    major, minor = torch.cuda.get_device_capability()
    shape = fastres.Input(tuple(images.shape))
    engine = fastres.compile(net, shape, target=f"sm_{major}{minor}", precision="fp16")
    engine.save(tmp_path / "e")
    with fastres.load(tmp_path / "e", trust_engine=True) as loaded:
        wanted = loaded(images.cuda()).float().cpu().numpy()
    found = deploy.load(tmp_path / "e", trust_engine=True)(images.numpy())
    assert np.array_equal(found, wanted)
