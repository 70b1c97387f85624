"""fastres.graph.readers: each operator's reader, its limits, and what is kept for PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.errors import CaptureError
from fastres.graph import serial
from fastres.graph.calls import Call, Emit
from fastres.graph.capture import capture
from fastres.graph.ir import (
    Activation,
    Add,
    Aten,
    AvgPool,
    BatchNorm,
    Concat,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Mul,
    Op,
    Pad,
    Slice,
    Softmax,
)
from fastres.graph.readers import READERS
from fastres.graph.shapes import infer_shapes
from fastres.options import Input

Agree = Callable[..., None]
ModelOf = Callable[..., nn.Module]
SMALL = Input((1, 3, 8, 8))
RANGED = Input(((1, 3, 6, 6), (1, 3, 8, 8), (4, 3, 40, 40)))


def graph_of(model: nn.Module, image: Input = SMALL) -> Graph:
    return capture(model, [image]).graph


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def conv(c: int = 3, k: int = 4, size: Any = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, k, size, **{"padding": 1, **options})


@dataclass(frozen=True)
class Case:
    """A forward, and the operations it must become; None where only its meaning matters."""

    forward: Callable[..., Any]
    ops: list[Op | str] | None = None
    parts: dict[str, Callable[[], nn.Module | Tensor]] = field(default_factory=dict)
    inputs: tuple[Input, ...] = (SMALL,)


def layer(make: Callable[[], nn.Module], op: Op | str) -> Case:
    return Case(lambda m, x: m.layer(x), [op], {"layer": make})


def call(forward: Callable[[Tensor], Tensor], *found: Op | str) -> Case:
    return Case(lambda m, x: forward(x), list(found))


ONES = (1, 1, 1, 1)
ZEROS = (0, 0, 0, 0)
OPEN = (None, None, None, None)

# one case an operator that the IR knows, and its limits
OPERATORS = {
    "conv": layer(lambda: conv(stride=2), Conv2d((2, 2), (1, 1))),
    "conv grouped": layer(
        lambda: conv(3, 6, groups=3, dilation=2), Conv2d(ONES[:2], (1, 1), (2, 2), 3)
    ),
    "conv padding valid": layer(lambda: conv(padding="valid"), Conv2d()),
    "conv padding same": layer(
        lambda: conv(padding="same", dilation=2), Conv2d((1, 1), (2, 2), (2, 2))
    ),
    "conv padding same, not square": layer(
        lambda: conv(size=(3, 5), padding="same"), Conv2d((1, 1), (1, 2))
    ),
    "conv padding same, even": layer(lambda: conv(size=2, padding="same"), "aten.conv2d.padding"),
    "conv computed weight": Case(
        lambda m, x: F.conv2d(x, m.w * 2.0), None, {"w": lambda: nn.Parameter(draw(4, 3, 1, 1))}
    ),
    "conv transposed": layer(lambda: nn.ConvTranspose2d(3, 4, 2, 2), "aten.conv_transpose2d.input"),
    "batch norm": layer(lambda: nn.BatchNorm2d(3), BatchNorm()),
    "batch norm eps": layer(lambda: nn.BatchNorm2d(3, eps=0.1), BatchNorm(0.1)),
    "batch norm not affine": layer(lambda: nn.BatchNorm2d(3, affine=False), BatchNorm()),
    "relu": call(F.relu, Activation("relu")),
    "silu": call(F.silu, Activation("silu")),
    "sigmoid": call(torch.sigmoid, Activation("sigmoid")),
    "gelu": call(F.gelu, Activation("gelu")),
    "gelu tanh": call(lambda x: F.gelu(x, approximate="tanh"), "aten.gelu.default"),
    "hardswish": call(F.hardswish, Activation("hardswish")),
    "relu6": call(F.relu6, "aten.relu6.default"),
    "add": call(lambda x: x + x, Add()),
    "add scaled": call(lambda x: torch.add(x, x, alpha=2), "aten.add.Tensor"),
    "add of two dtypes": call(
        lambda x: x + (4 * x.to(torch.int64)),
        *["aten.to.dtype", "aten.mul.Tensor", "aten.add.Tensor"],
    ),
    "mul": call(lambda x: x * x, Mul()),
    "scale": call(lambda x: x * 0.5, "aten.mul.Tensor"),
    "shift": call(lambda x: x + 1, "aten.add.Tensor"),
    "max pool": call(lambda x: F.max_pool2d(x, 3, 2, 1, 1), MaxPool((3, 3), (2, 2), (1, 1))),
    "max pool stride": call(lambda x: F.max_pool2d(x, (2, 3)), MaxPool((2, 3), (2, 3))),
    "max pool ceil": call(
        lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), MaxPool((3, 3), (2, 2), ceil_mode=True)
    ),
    "avg pool": call(
        lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        AvgPool((3, 3), (2, 2), (1, 1), count_include_pad=False),
    ),
    "avg pool divisor": call(
        lambda x: F.avg_pool2d(x, 2, divisor_override=3), "aten.avg_pool2d.default"
    ),
    "adaptive to 1": call(lambda x: F.adaptive_avg_pool2d(x, 1), GlobalAvgPool()),
    "adaptive to 4": call(lambda x: F.adaptive_avg_pool2d(x, 4), AvgPool((2, 2), (2, 2))),
    "adaptive to 3": call(
        lambda x: F.adaptive_avg_pool2d(x, 3), "aten.adaptive_avg_pool2d.default"
    ),
    "mean": call(lambda x: x.mean((-1, 2)), GlobalAvgPool(keepdim=False)),
    "mean of channels": call(lambda x: x.mean(1), "aten.mean.dim"),
    "linear": layer(lambda: nn.Linear(8, 5), Linear()),
    "flatten": call(lambda x: x.flatten(1), Flatten(1)),
    "flatten pixels": call(lambda x: x.flatten(2), Flatten(2)),
    "flatten the middle": call(lambda x: x.flatten(1, 2), "aten.flatten.using_ints"),
    "view": call(lambda x: x.view(x.size(0), -1), Flatten(1)),
    "reshape": call(lambda x: x.reshape(-1, 3, 64), Flatten(2)),
    "cat": call(lambda x: torch.cat((x, x * x), -3), Mul(), Concat(1)),
    "pad": call(
        lambda x: F.pad(x, (1, 2, 0, 3, 4, 0), value=0.5),
        Pad((0, 4, 0, 1), (0, 0, 3, 2), 0.5),
    ),
    "pad by reflection": call(lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), "aten.pad.default"),
    "cut": call(lambda x: F.pad(x, (-1, 0)), "aten.pad.default"),
    "slice": call(
        lambda x: x[:, 1:, ::2, -3:7],
        Slice((0, 1, 0, 0), OPEN, ONES),
        Slice(ZEROS, OPEN, (1, 1, 2, 1)),
        Slice((0, 0, 0, -3), (None, None, None, 7), ONES),
    ),
    "slice of all": call(lambda x: x[:, :, 0:99] + x, Add()),
    "chunk": call(lambda x: x.chunk(2, 2)[1], Slice((0, 0, 4, 0), (None, None, 8, None), ONES)),
    "split": call(
        lambda x: x.split([1, 2], 1)[1], Slice((0, 1, 0, 0), (None, 3, None, None), ONES)
    ),
    "softmax": call(lambda x: x.softmax(1), Softmax(1)),
    "dropout": call(lambda x: F.dropout(x, training=False) * x, Mul()),
    "dropout of maps": call(lambda x: F.dropout2d(x, training=False) * x, Mul()),
    "alpha dropout": call(lambda x: F.alpha_dropout(x, 0.5, False) * x, Mul()),
    "identities": call(
        lambda x: x.contiguous().clone().detach().to(x.device).type_as(x) * x,
        Mul(),
    ),
    "channels last": call(lambda x: x.to(memory_format=torch.channels_last) * x, Mul()),
    "same dtype": Case(lambda m, x: x.to(m.w.dtype) * m.w, [Mul()], {"w": lambda: draw(8)}),
    "literal": call(
        lambda x: x * torch.tensor([1.0, 2.0]).repeat(4).to(x.dtype),
        *["aten.repeat.default", Mul()],
    ),
}


class TestOperators:
    @pytest.mark.parametrize("name", OPERATORS)
    def test_keeps_its_meaning(self, name: str, agree: Agree, model_of: ModelOf) -> None:
        case = OPERATORS[name]
        model = model_of(case.forward, **{k: make() for k, make in case.parts.items()})
        graph = graph_of(model)
        if case.ops is not None:
            found = [n.op.overload if isinstance(n.op, Aten) else n.op for n in graph]
            assert found == case.ops
        for n in (1, 2, 5):
            agree(model, graph, [draw(n, 3, 8, 8)])


# operations outside the IR, run by PyTorch: every batch size, not only the example's
KEPT = {
    "roll": lambda m, x: torch.roll(x, 1, 1),
    "squeeze and excitation": lambda m, x: (
        x * m.fc(x.mean((2, 3))).sigmoid().view(x.size(0), 3, 1, 1)
    ),
    "expand": lambda m, x: x + x.mean((2, 3), True).expand(-1, -1, x.size(2), x.size(3)),
    "expand as": lambda m, x: x + x.amax((2, 3), True).expand_as(x),
    "shuffle of channels": lambda m, x: (
        torch.cat((x, -x), 1).view(x.size(0), 2, 3, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
    ),
    "zeros of the batch": lambda m, x: torch.cat((x, x.new_zeros(x.size(0), 2, 8, 8)), 1),
    "ones like": lambda m, x: torch.cat((x, torch.ones_like(x)), 1),
    "infinity": lambda m, x: x.masked_fill(x < 0, -torch.inf).amax((2, 3)),
    "clamp": lambda m, x: x.clamp(min=-0.5),
    "indices": lambda m, x: x.gather(1, x.argmax(1, keepdim=True)),
    "group norm": lambda m, x: F.group_norm(x, 3),
    "interpolate": lambda m, x: F.interpolate(x, scale_factor=2.0),
    "interpolate to": lambda m, x: F.interpolate(x[:, :, ::2, ::2], x.shape[2:], mode="bilinear"),
    "transpose and copy": lambda m, x: x.transpose(1, 3).contiguous() * 2,
    "unbatched pool": lambda m, x: F.max_pool2d(x.mean(1), 2),
    "arange": lambda m, x: x * (1 + torch.arange(x.shape[0])[:, None, None, None]),
    "attention": lambda m, x: F.scaled_dot_product_attention(x, x, x),
    "mean of the batch": lambda m, x: x + x.mean(0, keepdim=True),
}


class TestKept:
    @pytest.mark.parametrize("name", KEPT)
    def test_for_every_batch(self, name: str, agree: Agree, model_of: ModelOf) -> None:
        model = model_of(KEPT[name], fc=nn.Linear(3, 3))
        graph = graph_of(model)
        assert any(isinstance(node.op, Aten) for node in graph)
        for n in (1, 2, 5):
            agree(model, graph, [draw(n, 3, 8, 8)])
        for n in (0, 1, 5):  # PyTorch tells shapes without running anything
            shapes = infer_shapes(graph, [(n, 3, 8, 8)])
            assert all(shapes[output][0] == n for output in graph.outputs)

    @pytest.mark.parametrize("name", KEPT)
    def test_survives_a_file(self, name: str, model_of: ModelOf) -> None:
        graph = graph_of(model_of(KEPT[name], fc=nn.Linear(3, 3)))
        found, *_ = serial.decode(*serial.encode(graph, graph), [(2, 3, 8, 8)])
        assert found.equals(graph)

    @pytest.mark.parametrize(
        "name",
        ["roll", "squeeze and excitation", "expand", "shuffle of channels", "interpolate to"],
    )
    def test_for_every_picture(self, name: str, agree: Agree, model_of: ModelOf) -> None:
        model = model_of(KEPT[name], fc=nn.Linear(3, 3))
        graph = graph_of(model, RANGED)
        for n, height, width in ((1, 8, 8), (3, 11, 7)):
            agree(model, graph, [draw(n, 3, height, width)])

    def test_a_size_is_read_off_an_operand_where_it_can_be(self, model_of: ModelOf) -> None:
        def forward(m: Any, x: Tensor) -> Tensor:
            y = m.conv(x)
            halves = y.view(y.size(0), 2, 2, y.size(2), y.size(3))
            return halves.amax((3, 4), True).expand(-1, -1, -1, y.size(2), y.size(3)) * halves

        graph = graph_of(model_of(forward, conv=conv(stride=2)), RANGED)
        assert graph["view"].inputs == ("conv",)
        assert graph["expand"].inputs == ("amax", "inputs_0")  # what it reads has no H left
        assert '{"size":[1,2,1,2]}' in graph["expand"].op.args


def test_a_misread_call_is_found(monkeypatch: pytest.MonkeyPatch, model_of: ModelOf) -> None:
    """Whatever a reader makes of a call must have the shape that PyTorch saw, for every size."""

    def misread(call: Call) -> Emit:
        return Emit(Pad(ZEROS, (0, 0, 1, 0)), (call.value("self"),))

    monkeypatch.setitem(READERS, "aten.relu.default", misread)
    message = r"relu \(aten.relu.default\) was read as f32\[N, 3, H\+1, W\], PyTorch has torch.Size"
    with pytest.raises(CaptureError, match=message):
        graph_of(model_of(lambda m, x: F.relu(x)), RANGED)
