"""Views, copies and strides: a later view is never read on another layout than the model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.backends.reference import ReferenceExecutable
from fastres.graph.capture import capture
from fastres.graph.memory import memory_order
from fastres.options import Input

Agree = Callable[..., None]
ModelOf = Callable[..., nn.Module]
LAST = torch.channels_last
GIVEN = Input((1, 8, 6, 10))

FORMS: dict[str, Callable[[Tensor], Any]] = {
    "shuffle": lambda y: (
        y.view(y.shape[0], 2, 4, 6, 10).transpose(1, 2).contiguous().view(y.shape[0], 8, 6, 10)
    ),
    "shuffle by flatten": lambda y: y.unflatten(1, (4, 2)).transpose(1, 2).flatten(1, 2),
    "view of a copy": lambda y: y.permute(0, 2, 3, 1).contiguous().view(y.shape[0], -1, 4),
    "view of a clone": lambda y: (
        y.transpose(1, 3).clone(memory_format=torch.contiguous_format).view(y.shape[0], 10, 48)
    ),
    "view of channels_last": lambda y: (
        y.to(memory_format=LAST).permute(0, 2, 3, 1).view(y.shape[0], 60, 8)
    ),
    "view as": lambda y: y.transpose(2, 3).contiguous().view_as(y) + y,
    "expand": lambda y: y.mean(1, keepdim=True).expand(-1, 4, -1, -1).contiguous().view(-1, 4, 60),
    "heads": lambda y: (y.flatten(2).transpose(1, 2) @ y.flatten(2)).softmax(-1),
    "strided": lambda y: (y * 2).as_strided((y.shape[0], 4, 6, 5), (480, 120, 10, 2)),
    "strided behind a copy": lambda y: (
        y.transpose(2, 3).contiguous().as_strided((y.shape[0], 8, 10, 3), (480, 60, 6, 2))
    ),
    "strided behind a view": lambda y: (
        (y * 2).transpose(2, 3).as_strided((y.shape[0], 8, 10, 3), (480, 60, 6, 2))
    ),
    "strided in channels_last": lambda y: (
        (y * 2).to(memory_format=LAST).as_strided((y.shape[0], 6, 80), (480, 80, 1))
    ),
    "strided with overlaps": lambda y: (y * 2).as_strided((y.shape[0], 5, 3), (480, 2, 1), 7),
    "strided behind the shuffle": lambda y: (
        y.view(y.shape[0], 2, 4, 6, 10)
        .transpose(1, 2)
        .contiguous()
        .as_strided((y.shape[0], 8, 60), (480, 60, 1))
    ),
    "written through strides": lambda y: (y * 2).as_strided_scatter(
        y[:, :4, :, :5] * 9, (y.shape[0], 4, 6, 5), (480, 120, 10, 2)
    ),
    "bits of integers": lambda y: (y * 9).int().view(torch.int8).float(),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", FORMS)
def test_means_what_the_model_means(name: str, last: bool, backend: str, model_of: ModelOf) -> None:
    """Fed both layouts, and whatever layout the convolution before gives."""
    model = model_of(lambda m, x: FORMS[name](m.conv(x)), conv=nn.Conv2d(8, 8, 3, padding=1))
    with fastres.compile(model, GIVEN, backend=backend, on_unsupported="fallback") as engine:
        for n in (1, 2, 3):
            x = torch.randn(n, 8, 6, 10)
            want = model(x)
            got = engine(x.to(memory_format=LAST) if last else x)
            assert got.shape == want.shape
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_its_operands_may_lie_in_any_order(name: str, model_of: ModelOf) -> None:
    graph = capture(model_of(lambda m, x: FORMS[name](x)), [GIVEN]).graph
    x = torch.randn(2, 8, 6, 10)
    for given in (x.to(memory_format=LAST), x.transpose(2, 3).contiguous().transpose(2, 3)):
        (got,) = ReferenceExecutable(graph, torch.float32).run([given])
        assert torch.allclose(got, FORMS[name](x), atol=1e-5)


def test_memory_order() -> None:
    x = torch.zeros(2, 3, 4, 5)
    assert memory_order(x) == (0, 1, 2, 3)
    assert memory_order(x.permute(3, 1, 0, 2)) == (2, 1, 3, 0)
    assert memory_order(x.to(memory_format=LAST)) == (0, 2, 3, 1)
    assert memory_order(torch.zeros(2, 1, 4).as_strided((2, 1, 4), (4, 99, 1))) == (0, 1, 2)
    parts = (x[:, 1:], x[1:], x[..., ::2], x[:, :1].expand(2, 3, 4, 5), x[:1])
    assert [memory_order(part) for part in parts] == [None] * len(parts)
