"""Calls with several results: each that is used is kept, for every batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres
from fastres.errors import GraphError
from fastres.graph import serial
from fastres.graph.capture import capture
from fastres.graph.ir import Aten, BatchNorm, MaxPool
from fastres.options import Input

Agree = Callable[..., None]
ModelOf = Callable[..., nn.Module]
GIVEN = Input((1, 4, 8, 8))
aten = torch.ops.aten


def batch_norm(operator: Any, *more: Any) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        n = m.norm
        return operator(x, n.weight, n.bias, n.running_mean, n.running_var, *more)[0]  # type: ignore[no-any-return]

    return forward


def _foreach(m: Any, x: Tensor) -> Any:
    y, z = x * 1.0, x * 2.0
    torch._foreach_add_([y, z], [z * 1.0, x])
    return y, z


def out(m: Any, x: Tensor) -> Tensor:
    y = x * 1.0
    torch.add(x, x, out=y)
    return y


def autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.conv(x) * 2.0


def with_grad(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = m.conv(x)
    return y * 2.0


AS_IR: dict[str, tuple[Callable[..., Any], type]] = {
    "adaptive max pool": (lambda m, x: F.adaptive_max_pool2d(x, 1), MaxPool),
    "adaptive max pool to two": (lambda m, x: F.adaptive_max_pool2d(x, (2, 4)), MaxPool),
    "max pool with indices": (lambda m, x: aten.max_pool2d_with_indices(x, 3, 2, 1)[0], MaxPool),
    "native batch norm": (batch_norm(aten.native_batch_norm, False, 0.1, 1e-3), BatchNorm),
    "batch norm of core ATen": (
        batch_norm(aten._native_batch_norm_legit_no_training, 0.1, 1e-3),
        BatchNorm,
    ),
}
KEPT: dict[str, Callable[..., Any]] = {
    "maxima of a dimension": lambda m, x: x.max(1)[0],
    "where they are": lambda m, x: x.max(1),
    "minima": lambda m, x: x.min(3, keepdim=True).values,
    "largest": lambda m, x: x.flatten(1).topk(5),
    "sorted": lambda m, x: x.flatten(1).sort(descending=True)[0],
    "deviation and mean": lambda m, x: torch.std_mean(x, (2, 3)),
    "variance and mean": lambda m, x: torch.var_mean(x, 1, keepdim=True),
    "median": lambda m, x: x.median(2).values,
    "cumulated": lambda m, x: x.cummax(1)[0],
    "both ends": lambda m, x: torch.aminmax(x, dim=1),
    "halves of the height": lambda m, x: x.chunk(2, 2)[1],
    "uneven parts": lambda m, x: x.split([1, 3], 1),
    "taken apart": lambda m, x: x.unbind(1)[2],
    "adaptive max pool, odd": lambda m, x: F.adaptive_max_pool2d(x, 3),
    "with indices": lambda m, x: F.adaptive_max_pool2d(x, 2, return_indices=True),
    "unpooled": lambda m, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "group norm": lambda m, x: aten.native_group_norm(x, None, None, x.shape[0], 4, 64, 2, 1e-5)[0],
    "lists in place": _foreach,
    "out": out,
    "a region without autocast": autocast,
    "a region with gradient": with_grad,
}


def model(model_of: ModelOf, forward: Callable[..., Any]) -> nn.Module:
    return model_of(forward, norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 3))


@pytest.mark.parametrize("name", AS_IR)
def test_read_where_the_ir_knows_them(name: str, model_of: ModelOf, agree: Agree) -> None:
    forward, op = AS_IR[name]
    net = model(model_of, forward)
    graph = capture(net, [GIVEN]).graph
    assert [type(node.op) for node in graph] == [op]
    for n in (1, 3):
        agree(net, graph, [torch.randn(n, 4, 8, 8)])


@pytest.mark.parametrize("name", KEPT)
def test_kept_for_pytorch(name: str, model_of: ModelOf, agree: Agree) -> None:
    net = model(model_of, KEPT[name])
    graph = capture(net, [GIVEN]).graph
    written = *serial.encode(graph, graph), [(1, 4, 8, 8)]
    if name == "lists in place":  # it becomes a `_foreach_add`, which no file may hold
        with pytest.raises(GraphError, match="_foreach_add.List, which no saved engine may"):
            serial.decode(*written)
    else:
        found, *_ = serial.decode(*written)
        assert found.replace(output_tree=graph.output_tree).equals(graph)  # without `torch.max`
    for n in (1, 2, 5):
        agree(net, graph, [torch.randn(n, 4, 8, 8)])


def test_only_what_is_used_is_computed(model_of: ModelOf) -> None:
    graph = capture(model(model_of, lambda m, x: x.topk(2, 1)[1]), [GIVEN]).graph
    (node,) = graph.nodes
    assert isinstance(node.op, Aten) and node.op.index == 1 and node.spec.dtype == "int64"


def test_in_an_engine(model_of: ModelOf) -> None:
    """As fastai's AdaptiveConcatPool2d, whose max pool has windows of several sizes."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return torch.cat([F.adaptive_max_pool2d(y, 4), F.adaptive_avg_pool2d(y, 4)], 1)

    net = model(model_of, forward)
    x = torch.randn(3, 4, 8, 8)
    with fastres.compile(net, x, on_unsupported="fallback") as engine:
        assert torch.allclose(engine(x), net(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # of PyTorch 2.11, at itself
@pytest.mark.parametrize("decompose", [lambda p: p, lambda p: p.run_decompositions()])
def test_programs_in_core_aten(decompose: Callable[..., Any]) -> None:
    """They compile without falling back, to the graph of the model itself."""
    from fastres import models
    from fastres.graph.passes.pipeline import optimise

    net = models.ResNet(models.Bottleneck, (1, 1, 1, 1), planes=8, num_classes=5, seed=0).eval()
    batch = ({0: torch.export.Dim("n", min=1, max=64)},)
    with torch.no_grad():
        program = torch.export.export(net, (torch.zeros(2, 3, 64, 64),), dynamic_shapes=batch)
    program = decompose(program)
    graph = optimise(capture(program, ()).graph)
    want = optimise(capture(net, [Input((1, 3, 64, 64))]).graph)
    assert [type(node.op) for node in graph] == [type(node.op) for node in want]
    x = torch.randn(3, 3, 64, 64)
    with fastres.compile(program) as engine:
        assert torch.allclose(engine(x), net(x), atol=1e-4)
