"""fastres.graph.symbols: where a slice ends, for every size that the inputs range over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastres.errors import CaptureError
from fastres.graph.capture import capture
from fastres.options import Input

Agree = Callable[..., None]
ModelOf = Callable[..., nn.Module]
RANGED = Input(((1, 3, 6, 6), (1, 3, 8, 8), (4, 3, 12, 10)))
SHAPES = ((1, 3, 6, 6), (2, 3, 7, 10), (3, 3, 12, 9))

CROPS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[str, str]]] = {
    "a border": (lambda m, x: x[:, :, 1:-1, 1:-1] * 2, ("H-2", "W-2")),
    "a wide border": (lambda m, x: x[:, :, 2:-3] * 2, ("H-5", "W")),
    "the last": (lambda m, x: x[:, :, -3:] * 2, ("3", "W")),
    "the first": (lambda m, x: x[:, :, :6, :4] * 2, ("6", "4")),
    "all but the last": (lambda m, x: x[..., :-2] * 2, ("H", "W-2")),
    "more than there are": (lambda m, x: x[..., :10] * 2, ("H", "W")),
    "every second": (lambda m, x: x[:, :, 1:-1:2, 1::2] * 2, ("(H-1)//2", "W//2")),
    "after a convolution": (lambda m, x: m.conv(x)[:, :, 1:-1] * 2, ("(H-3)//2", "(W+1)//2")),
    "the lower half": (lambda m, x: x[:, :, x.shape[2] // 2 :] * 2, ("(H+1)//2", "W")),
    "the upper half": (lambda m, x: x[:, :, : x.shape[2] // 2] * 2, ("H//2", "W")),
    "the second of two pieces": (lambda m, x: x.chunk(2, 3)[1] * 2, ("H", "W//2")),
    "all but a third": (lambda m, x: x[:, :, x.shape[2] // 3 :] * 2, ("(2*H+2)//3", "W")),
    "above each other": (lambda m, x: torch.cat((x, x[:, :, 1:] * 2), 2), ("2*H-1", "W")),
    "at least so many": (
        lambda m, x: nn.functional.pad(x, (0, max(x.shape[3], 5) - x.shape[3])) * 2,
        ("H", "W"),
    ),
}


@pytest.mark.parametrize("name", CROPS)
def test_crops(name: str, agree: Agree, model_of: ModelOf) -> None:
    forward, sizes = CROPS[name]
    model = model_of(forward, conv=nn.Conv2d(3, 4, 3, stride=2, padding=1))
    graph = capture(model, [RANGED]).graph
    assert tuple(map(str, graph.spec(graph.outputs[0]).shape[2:])) == sizes
    for shape in SHAPES:
        agree(model, graph, [torch.randn(shape)])


@pytest.mark.parametrize("end", [7, 9, -7])
def test_an_end_that_some_sizes_have(end: int, model_of: ModelOf) -> None:
    with pytest.raises(CaptureError, match=r"has a size of M(in|ax)\(.*Fix H and W"):
        capture(model_of(lambda m, x: x[..., :end] * 2), [RANGED])


def test_a_batch_may_be_larger_than_any_that_was_named(model_of: ModelOf) -> None:
    with pytest.raises(CaptureError, match=r"has a size of Min\(4, N\)"):
        capture(model_of(lambda m, x: x[:4] * 2), [RANGED])
