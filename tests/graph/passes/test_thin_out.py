"""thin_out: ResNet v1's stages in int8 begin with a pool; the numbers stay, and others are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.backends.reference import ReferenceExecutable
from fastres.graph import laws
from fastres.graph.capture import capture
from fastres.graph.ir import Conv2d, Graph, MaxPool
from fastres.graph.passes.pipeline import optimise
from fastres.graph.passes.quantise import quantise
from fastres.graph.passes.thin_out import thin_out
from fastres.options import Input
from fastres.quantization.calibrate import collect


class Stage(nn.Module):
    """Two strided convolutions behind another, and what else its forward does."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], kernel: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(4, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 6, kernel, 2, padding=kernel // 2)
        self.c = nn.Conv2d(8, 6, 1, 2)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def stage(s: Any, x: Tensor) -> Any:
    y = s.a(x).relu()
    return F.relu(s.b(y) + s.c(y))


def another_reader(s: Any, x: Tensor) -> Any:
    y = s.a(x).relu()
    return s.b(y), F.max_pool2d(y, 2)


def quantised(model: nn.Module) -> Graph:
    graph = optimise(capture(model.eval(), [Input((1, 4, 9, 9))]).graph)
    data = [(torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1)),)]
    table = collect(graph, [Input((1, 4, 9, 9))], data, "minmax")
    return quantise(graph, table, "both", unsigned=True)


def run(graph: Graph, x: Tensor) -> list[Tensor]:
    return ReferenceExecutable(graph, torch.float32).run([x])


def test_one_pool_for_all_readers_and_the_same_bits() -> None:
    before = quantised(Stage(stage))
    after = laws.check(thin_out(before), "thin_out")
    (pool,) = [node for node in after.nodes if isinstance(node.op, MaxPool)]
    assert pool.op == MaxPool((1, 1), (2, 2)) and pool.name.endswith(".thinned")
    strides = [n.op.stride for n in after.nodes if isinstance(n.op, Conv2d)]
    assert strides == [(1, 1)] * 3
    x = torch.randn(3, 4, 9, 9)
    assert all(map(torch.equal, run(before, x), run(after, x)))
    assert thin_out(after).nodes == after.nodes


@pytest.mark.parametrize(
    "model",
    [Stage(another_reader), Stage(stage, kernel=3)],
    ids=["another reader", "a 3x3 among them"],
)
def test_what_others_read_is_left(model: nn.Module) -> None:
    before = quantised(model)
    assert thin_out(before).nodes == before.nodes
