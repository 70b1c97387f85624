"""What is built for which batch, kept, and taken from files; ONNX Runtime stands for TensorRT."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

import fastres
from fastres.assembly.assemble import optimised
from fastres.backends.base import CompiledParts
from fastres.backends.tensorrt import backend, executable
from fastres.backends.tensorrt.api import Api
from fastres.backends.tensorrt.backend import TensorRtBackend
from fastres.backends.tensorrt.executable import TensorRtExecutable
from fastres.backends.tensorrt.plan import Built, Layer
from fastres.backends.tensorrt.stored import read_plan
from fastres.errors import CaptureError, ParityError
from fastres.graph.ir import Graph
from fastres.options import Options
from fastres.source import source_of

pytestmark = pytest.mark.usefixtures("one_thread")
API = Api(None, "tensorrt", (11, 4, 0))
LAYERS = (Layer("conv", "Convolution", ("conv1",), ("fp32",), ("fp32",)),)


class World:
    """A GPU and a builder that are not there: what was built, and how it is run."""

    def __init__(self) -> None:
        self.builds: list[dict[str, Any]] = []
        self.factor = 1.0  # by which outputs are wrong

    def build(self, api: Api, onnx: bytes, ranges: Any, **more: Any) -> Built:
        (shapes,) = ranges.values()
        self.builds.append({"largest": shapes.largest, "usual": shapes.usual, **more})
        return Built(onnx, LAYERS, b"timings")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    world = World()

    class Runner:
        def __init__(self, api: Api, plan: bytes, names: Any, device: Any, *more: Any) -> None:
            self.session = onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"])

        def layers(self) -> tuple[Layer, ...]:
            return ()

        def run(self, inputs: Sequence[Tensor], shapes: Any) -> list[Tensor]:
            names = (entry.name for entry in self.session.get_inputs())
            given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
            found = self.session.run(None, given)
            assert [tuple(y.shape) for y in found] == shapes
            return [world.factor * torch.from_numpy(y) for y in found]

    monkeypatch.setattr(executable, "build", world.build)
    monkeypatch.setattr(executable, "TensorRtRunner", Runner)
    monkeypatch.setattr(backend, "find_api", lambda target=None: API)
    monkeypatch.setattr(TensorRtBackend, "unavailable", lambda *a: None)
    monkeypatch.setattr(TensorRtBackend, "device", lambda *a: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return world


@pytest.fixture(scope="module")
def small(images: Tensor) -> torch.nn.Module:
    return fastres.models.settle(fastres.models.cifar_resnet(8, seed=0), images)


@pytest.fixture
def graph(small: torch.nn.Module, images: Tensor, world: World) -> Graph:
    return optimised(source_of(small, images[:1]).graph, CaptureError)


def lower(graph: Graph, n: int, parts: CompiledParts | None = None, **options: Any) -> Any:
    given = Options(precision="fp32", **options)
    return TensorRtExecutable(API, graph, given, torch.device("cpu"), ((n, 3, 64, 64),), parts)


@pytest.mark.parametrize(
    ("usual", "limit", "calls", "engines"),
    [
        (1, None, (1, 8, 32), [32]),
        (1, None, (33, 64, 100), [32, 64, 128]),
        (48, None, (48, 1), [48]),
        (8, 8, (8, 3), [8]),
        (8, 8, (9,), [8, 16]),
        (8, 2, (1, 2), [2]),
    ],
)
def test_engines_serve_ranges_of_batches(
    world: World,
    graph: Graph,
    usual: int,
    limit: int | None,
    calls: Sequence[int],
    engines: list[int],
) -> None:
    made = lower(graph, usual, max_batch_size=limit)
    for n in calls:
        (y,) = made.run([torch.randn(n, 3, 64, 64)])
        assert y.shape[0] == n
    assert [build["largest"][0] for build in world.builds] == engines
    assert {build["usual"][0] for build in world.builds} == {min(usual, limit or usual)}
    assert {build["tf32"] for build in world.builds} == {False}


def test_engines_go_with_what_made_them(world: World, graph: Graph) -> None:
    gc.collect()
    gc.disable()
    try:
        made = lower(graph, 1)
        made.run([torch.zeros(1, 3, 64, 64)])
        engine = weakref.ref(made._engine(((1, 3, 64, 64),)))
        del made
        assert engine() is None
    finally:
        gc.enable()


def test_what_multiplies_floats_ran_as_asked(world: World, graph: Graph) -> None:
    """TensorRT's type is Float with TF32 and without."""
    shapes = ((1, 3, 64, 64),)
    for precision in ("fp32", "tf32"):
        options = Options(precision=precision)
        made = TensorRtExecutable(API, graph, options, torch.device("cpu"), shapes, None)
        assert made.precisions() == {"conv1": precision}
        assert world.builds[-1]["tf32"] == (precision == "tf32")


def test_timings_are_kept_by_gpu_and_version(world: World, graph: Graph, tmp_path: Path) -> None:
    lower(graph, 1)
    (file,) = (tmp_path / "fastres").iterdir()
    assert file.name == "timings_tensorrt_11_4_0_nvidia_h200.bin"
    lower(graph, 1)
    assert [build["timing_cache"] for build in world.builds] == [None, b"timings"]


def test_where_timings_cannot_be_kept_the_engine_is_still_made(
    world: World, graph: Graph, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "fastres").write_text("a file, not a folder")
    assert lower(graph, 1).run([torch.randn(1, 3, 64, 64)])
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize(("largest", "engine"), [(8, 32), (64, 64)])
def test_the_batches_that_inputs_promise_are_built_for(
    world: World, small: torch.nn.Module, largest: int, engine: int
) -> None:
    shapes = fastres.Input(((1, 3, 64, 64), (2, 3, 64, 64), (largest, 3, 64, 64)))
    made = fastres.compile(small, shapes, backend="tensorrt", verify=False)
    made(torch.zeros(largest, 3, 64, 64))
    (build,) = world.builds
    assert build["largest"][0] == engine and build["usual"][0] == 2


class Returns(torch.nn.Module):
    """What it is given, and one value twice."""

    def __init__(self) -> None:
        super().__init__()
        self.c = torch.nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.c(x)
        return y, x, y


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_is_returned_twice_or_untouched(world: World, precision: Any) -> None:
    net, x = Returns().eval(), torch.randn(2, 3, 8, 8)
    engine = fastres.compile(net, x, backend="tensorrt", precision=precision)
    for got, want in zip(engine(x), net(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


class TestSaved:
    def test_trusted_it_is_taken(self, world: World, graph: Graph) -> None:
        parts = lower(graph, 1).compiled()
        again = lower(graph, 1, CompiledParts(parts.files, trusted=True))
        assert len(world.builds) == 1
        assert again.account().notes[0].startswith("tensorrt 11.4.0 made")

    def test_untrusted_it_is_built_anew_and_said(
        self, world: World, graph: Graph, caplog: pytest.LogCaptureFixture
    ) -> None:
        parts = lower(graph, 1).compiled()
        again = lower(graph, 1, CompiledParts(parts.files))
        assert len(world.builds) == 2
        assert "built anew: TensorRT would run" in again.account().notes[0]
        assert "built anew" in caplog.text

    def test_on_another_gpu_it_is_built_anew(
        self, world: World, graph: Graph, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parts = lower(graph, 1).compiled()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
        again = lower(graph, 1, CompiledParts(parts.files, trusted=True))
        assert "built on NVIDIA H200, here is NVIDIA H100" in again.account().notes[0]
        assert len(world.builds) == 2

    def test_other_weights_are_another_network(
        self, world: World, graph: Graph, small: torch.nn.Module
    ) -> None:
        parts = lower(graph, 1).compiled()
        name = next(n for n, c in graph.constants.items() if c.dim() == 4)
        changed = graph.replace(constants={**graph.constants, name: graph.constants[name] * 2})
        again = lower(changed, 1, CompiledParts(parts.files, trusted=True))
        assert "another network or other weights" in again.account().notes[0]

    def test_what_is_saved_is_the_usual_engine(self, world: World, graph: Graph) -> None:
        made = lower(graph, 1)
        made.run([torch.randn(100, 3, 64, 64)])
        files = made.compiled().files
        found = read_plan(files)
        assert len(world.builds) == 2 and found is not None
        assert [shapes[2][0] for shapes in found[0].ranges.values()] == [32]
        assert found[0].gpu == "NVIDIA H200" and found[0].architecture == "sm_90"


class TestCheck:
    def test_a_build_is_compared_with_the_model_unless_told_otherwise(
        self, world: World, graph: Graph, small: torch.nn.Module, images: Tensor
    ) -> None:
        engine = fastres.compile(small, images[:1], backend="tensorrt")
        torch.testing.assert_close(engine(images), small(images), rtol=1e-3, atol=1e-3)
        world.factor = 1.01
        with pytest.raises(ParityError, match="first beyond its bound: conv1"):
            fastres.compile(small, images[:1], backend="tensorrt")
        assert fastres.compile(small, images[:1], backend="tensorrt", verify=False)

    @pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
    def test_each_precision_from_the_model_to_its_numbers(
        self, world: World, small: torch.nn.Module, images: Tensor, precision: Any
    ) -> None:
        data = [images] if precision == "int8" else None
        engine = fastres.compile(
            small, images[:1], backend="tensorrt", precision=precision, calibration=data
        )
        report = fastres.verify(small, engine, images, layerwise=True)
        assert report.passed, report

    def test_pictures_are_given_as_they_are_decoded(
        self, world: World, small: torch.nn.Module, images: Tensor
    ) -> None:
        engine = fastres.compile(
            small,
            images[:1],
            backend="tensorrt",
            precision="fp16",
            preprocess=fastres.Preprocess(),
            io_dtype=torch.uint8,
        )
        assert world.builds[0]["largest"] == (32, 64, 64, 3)
        assert engine(torch.zeros(2, 64, 64, 3, dtype=torch.uint8)).shape == (2, 10)

    def test_calibration_data_are_what_it_is_checked_on(
        self,
        world: World,
        graph: Graph,
        small: torch.nn.Module,
        images: Tensor,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from fastres.parity import verify as parity

        seen: list[Any] = []
        real = parity.verify

        def spy(reference: Any, engine: Any, data: Any, **more: Any) -> Any:
            seen.append(data)
            return real(reference, engine, data, **more)

        monkeypatch.setattr(parity, "verify", spy)
        fastres.compile(small, images[:1], backend="tensorrt", calibration=[images])
        assert len(seen) == 1 and torch.equal(seen[0][0][0], images)
