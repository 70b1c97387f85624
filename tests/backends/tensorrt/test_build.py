"""Engines really built, for a GPU that is not here: what they are made of, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch

import fastres
from fastres import models
from fastres.assembly.assemble import optimised
from fastres.backends.tensorrt import build as module
from fastres.backends.tensorrt.api import Api
from fastres.backends.tensorrt.build import build
from fastres.backends.tensorrt.layers import notes_on, precisions
from fastres.backends.tensorrt.plan import Built, Range
from fastres.errors import CaptureError, OutOfMemory, UnsupportedError
from fastres.graph.ir import Conv2d, Graph, Linear
from fastres.graph.onnx import to_onnx
from fastres.source import source_of, taking_pictures

TARGET = "sm_86"
SMALL = "cifar resnet20"
NETS = (
    "resnet18",
    "resnet50 v1",
    "resnet50 v1.5",
    SMALL,
    "resnext50",
    "dilated resnet50",
)
GraphOf = Callable[[str, str], Graph]
BuiltOf = Callable[[str, str], Built]
SHAPES = Range((1, 3, 32, 32), (8, 3, 32, 32), (32, 3, 32, 32))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("net", NETS)
def test_every_layer_is_one_of_ours_in_the_precision_asked_for(
    net: str, precision: str, graph_of: GraphOf, built: BuiltOf
) -> None:
    graph, engine = graph_of(net, precision), built(net, precision)
    assert len(engine.plan) > 100_000
    known = {node.name for node in graph.nodes} | {value.name for value in graph.inputs}
    named = {name for layer in engine.layers for name in layer.nodes}
    assert named <= known
    products = [node.name for node in graph.nodes if isinstance(node.op, Conv2d | Linear)]
    assert set(products) <= named
    ran = precisions(graph, engine.layers)
    assert {ran[name] for name in products} == {precision}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_additions_and_activations_are_part_of_convolutions(
    precision: str, graph_of: GraphOf, built: BuiltOf
) -> None:
    """One layer for each convolution, but for some where a stage begins."""
    graph, engine = graph_of("resnet50 v1.5", precision), built("resnet50 v1.5", precision)
    assert len(engine.layers) <= len(graph.nodes) + 2
    (note,) = notes_on(graph, engine.layers)
    assert note.startswith(("4 of 54 products leave", "5 of 54 products leave"))


def test_int8_is_told_as_found(graph_of: GraphOf, built: BuiltOf) -> None:
    """Products read int8; that their epilogues are kernels of their own is said."""
    net = "resnet18"
    notes = notes_on(graph_of(net, "int8"), built(net, "int8").layers)
    assert notes[0] == "21 of 21 products read int8"
    assert any("to a kernel of its own" in note for note in notes)


def test_half_as_many_bytes_in_fp16_and_fewer_in_int8(built: BuiltOf) -> None:
    sizes = [len(built("resnet50 v1.5", p).plan) for p in ("fp32", "fp16", "int8")]
    assert sizes[1] < 0.55 * sizes[0] and sizes[2] < 0.7 * sizes[1]


@pytest.mark.parametrize("flip", [False, True])
def test_pictures_of_bytes_come_in(rtx: Api, flip: bool) -> None:
    """uint8 [N, H, W, 3], which TensorRT casts before it does anything else with them."""
    net = models.cifar_resnet(8, seed=0).eval()
    preprocess = fastres.Preprocess(channels="BGR" if flip else "RGB")
    source = taking_pictures(source_of(net, fastres.Input((1, 3, 32, 32))), preprocess)
    proto = to_onnx(optimised(source.graph, CaptureError), half=True)
    shapes = Range((1, 32, 32, 3), (8, 32, 32, 3), (32, 32, 32, 3))
    engine = build(rtx, proto.SerializeToString(), {"x": shapes}, target=TARGET)
    assert any("x.normalize" in layer.nodes for layer in engine.layers)


def test_what_cannot_be_parsed_is_told_with_our_node(rtx: Api, graph_of: GraphOf) -> None:
    proto = to_onnx(graph_of(SMALL, "fp32"))
    (node,) = [n for n in proto.graph.node if n.name == "layer2.0.conv1"]
    node.op_type = "Convolve"
    with pytest.raises(UnsupportedError, match=r"(?s)cannot read the network.*layer2\.0\.conv1"):
        build(rtx, proto.SerializeToString(), {"x": SHAPES}, target=TARGET)


class Returns(torch.nn.Module):
    def __init__(self, untouched: bool) -> None:
        super().__init__()
        self.untouched, self.c = untouched, torch.nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.c(x)
        return x if self.untouched else (y, x, y)


@pytest.mark.parametrize("untouched", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_is_returned_twice_or_untouched(precision: Any, untouched: bool) -> None:
    engine = fastres.compile(
        Returns(untouched).eval(),
        torch.zeros(2, 3, 8, 8),
        backend="tensorrt",
        target=TARGET,
        precision=precision,
    )
    assert len(engine.compiled_parts().files) == 2


def test_no_room_for_such_batches(rtx: Api, graph_of: GraphOf) -> None:
    huge = Range((1, 3, 32, 32), (1, 3, 32, 32), (100_000, 3, 32, 32))
    proto = to_onnx(graph_of(SMALL, "fp32"), half=True)
    with pytest.raises(OutOfMemory, match="smaller max_batch_size"):
        build(rtx, proto.SerializeToString(), {"x": huge}, target=TARGET)


def test_what_is_no_onnx_is_refused(rtx: Api) -> None:
    for data in (b"", b"\0\1\2", b"no network" * 100):
        with pytest.raises(UnsupportedError, match="cannot"):
            build(rtx, data, {"x": SHAPES}, target=TARGET)


def test_impossible_shapes_are_refused(rtx: Api, graph_of: GraphOf) -> None:
    odd = Range((1, 5, 32, 32), (8, 5, 32, 32), (32, 5, 32, 32))
    data = to_onnx(graph_of(SMALL, "fp32")).SerializeToString()
    with pytest.raises(UnsupportedError, match="cannot build the network: ."):
        build(rtx, data, {"x": odd}, target=TARGET)


def test_mixed_types_are_refused_not_guessed(rtx: Api, graph_of: GraphOf) -> None:
    """Strong typing: a float16 product of float32 operands is an error in the file."""
    proto = to_onnx(graph_of(SMALL, "fp32"), half=True)
    (weight,) = [w for w in proto.graph.initializer if w.name.startswith("layer1.0.conv1.folded_w")]
    whole = onnx.numpy_helper.to_array(weight).astype("float32")
    weight.CopyFrom(onnx.numpy_helper.from_array(whole, weight.name))
    with pytest.raises(UnsupportedError, match="cannot"):
        build(rtx, proto.SerializeToString(), {"x": SHAPES}, target=TARGET)


@pytest.mark.parametrize("how", ["sound", "damaged", "of another GPU"])
def test_timings_that_cannot_be_used_are_left(how: str) -> None:
    class Config:
        cache: Any = None

        def create_timing_cache(self, data: bytes) -> bytes | None:
            return None if data and how == "damaged" else data

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            assert cache is not None and not ignore_mismatch
            if cache and how != "sound":
                return False
            self.cache = cache
            return True

    config = Config()
    module._set_timing_cache(config, b"timings")
    assert config.cache == (b"timings" if how == "sound" else b"")


def test_progress_moves_and_an_interrupt_stops_the_build(
    rtx: Api, graph_of: GraphOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = to_onnx(graph_of("resnet18", "fp32")).SerializeToString()
    shapes = {"x": Range((1, 3, 224, 224), (1, 3, 224, 224), (1, 3, 224, 224))}
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        raise KeyboardInterrupt

    class Bar:
        def __enter__(self) -> Any:
            return stop

        def __exit__(self, *ignored: object) -> None:
            pass

    monkeypatch.setattr(module, "progress_bar", lambda what: Bar())
    with pytest.raises(KeyboardInterrupt):
        build(rtx, data, shapes, target=TARGET)
    assert seen and all(0 < done <= total for done, total in seen)
