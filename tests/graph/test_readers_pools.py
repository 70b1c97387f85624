"""ceil_mode is read as nothing where no window is added by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres
from fastres.graph.capture import capture
from fastres.graph.ir import AvgPool, MaxPool
from fastres.options import Input

ModelOf = Callable[..., nn.Module]
ODD, EVEN = Input((1, 3, 9, 9)), Input((1, 3, 8, 8))
RANGED = Input(((1, 3, 6, 6), (1, 3, 8, 8), (1, 3, 40, 40)))

CASES: dict[str, tuple[Callable[[Tensor], Tensor], Input, bool]] = {
    "stride 1": (lambda x: F.max_pool2d(x, 3, 1, 1, ceil_mode=True), EVEN, False),
    "stride 1, any size": (lambda x: F.max_pool2d(x, 2, 1, 1, ceil_mode=True), RANGED, False),
    "stride 1 of an average": (lambda x: F.avg_pool2d(x, 3, 1, ceil_mode=True), RANGED, False),
    "an exact fit": (lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), ODD, False),
    "no exact fit": (lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), EVEN, True),
    "a window that starts in the padding": (
        lambda x: F.max_pool2d(x, 2, 2, 1, ceil_mode=True),
        ODD,
        False,
    ),
    "dilated": (lambda x: F.max_pool2d(x, 2, 2, 0, 2, ceil_mode=True), EVEN, True),
    "one side only": (lambda x: F.avg_pool2d(x, (1, 3), (1, 2), ceil_mode=True), EVEN, True),
    "larger than the image": (lambda x: F.avg_pool2d(x, 30, ceil_mode=True), EVEN, False),
    "larger on one side": (
        lambda x: F.avg_pool2d(x, (3, 9), (2, 5), ceil_mode=True, count_include_pad=False),
        EVEN,
        True,
    ),
    "a maximum over more than the image": (
        lambda x: F.max_pool2d(x, (20, 3), ceil_mode=True),
        ODD,
        False,
    ),
    "any size": (lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True), RANGED, True),
}


@pytest.mark.parametrize("name", CASES)
def test_ceil_mode(name: str, model_of: ModelOf, agree: Callable[..., None]) -> None:
    forward, given, rounds_up = CASES[name]
    model = model_of(lambda m, x: forward(x))
    graph = capture(model, [given]).graph
    op: Any = graph.nodes[0].op
    assert isinstance(op, MaxPool | AvgPool) and op.ceil_mode is rounds_up
    for shape in {given.smallest, given.usual, given.largest}:
        agree(model, graph, [torch.randn(2, *shape[1:])])


@pytest.mark.parametrize("pool", [F.avg_pool2d, F.max_pool2d])
def test_a_kernel_larger_than_the_image_runs(
    pool: Callable[..., Tensor], model_of: ModelOf
) -> None:
    model = model_of(lambda m, x: m.conv(pool(x, 64, ceil_mode=True)), conv=nn.Conv2d(3, 4, 1))
    x = torch.randn(2, 3, 5, 7)
    with fastres.compile(model, x, backend="cpu") as engine:
        assert torch.allclose(engine(x), model(x), atol=1e-5)
