"""Models that join the batch with something else: sizes of k*N, as heads and windows make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastres.graph.batching import why_not_split
from fastres.graph.capture import capture
from fastres.graph.ir import Graph
from fastres.graph.specs import Sym
from fastres.options import Input

Agree = Callable[..., None]
ModelOf = Callable[..., nn.Module]
SMALL = Input((1, 4, 8, 8))


def draw(n: int) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(n))


def graph_of(model: nn.Module) -> Graph:
    return capture(model.eval(), [SMALL]).graph


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def windows(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    parts = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
    parts = (parts @ parts.transpose(1, 2)).softmax(-1) @ parts
    return parts.view(n, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


def heads(m: Any, x: Tensor) -> Tensor:
    y = x.reshape(x.shape[0] * 2, 2, -1)
    return torch.bmm(y, y.transpose(1, 2)).reshape(x.shape[0], -1)


JOINED: dict[str, tuple[Callable[[Any, Tensor], Tensor], set[Sym]]] = {
    "windows": (windows, {Sym("N", mul=4)}),
    "heads": (heads, {Sym("N", mul=2)}),
    "channels, and left so": (lambda m, x: x.flatten(0, 1) * 2, {Sym("N", mul=4)}),
    "a border around them": (
        lambda m, x: nn.functional.pad(x.flatten(0, 1), (0, 0, 0, 0, 1, 0))[1:] * 2,
        {Sym("N", mul=4), Sym("N", 1, mul=4)},
    ),
    "every third channel": (lambda m, x: x.flatten(0, 1)[::3] * 2, {Sym("N", 2, 3, 4)}),
    "mirrored pictures": (lambda m, x: m.net(torch.cat((x, x.flip(3)))), {Sym("N", mul=2)}),
    "mirrored, and their mean": (
        lambda m, x: m.net(torch.cat((x, x.flip(3)))).view(2, x.shape[0], -1).mean(0),
        {Sym("N", mul=2)},
    ),
    "a number written out": (lambda m, x: x.view(2, -1) * 2, {Sym("N", mul=128)}),
    "pictures cut in two": (lambda m, x: x.reshape(-1, 4, 4, 8) * 2, {Sym("N", mul=2)}),
    "a size that is computed": (
        lambda m, x: x.sum((1, 2, 3)).view(-1, 1).expand(-1, x.shape[0] * 3 + 1) * 2,
        {Sym("N", 1, 1, 3)},
    ),
}


@pytest.mark.parametrize("name", JOINED)
def test_any_batch(name: str, agree: Agree, model_of: ModelOf) -> None:
    forward, sizes = JOINED[name]
    head = (nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    model = model_of(forward, net=nn.Sequential(*head))
    graph = graph_of(model)
    found = {d for node in graph.nodes for d in node.spec.shape if isinstance(d, Sym)}
    assert sizes <= found
    for n in (1, 2, 5):
        agree(model, graph, [draw(n)])


def test_attention(agree: Agree) -> None:
    model = Attention()
    for n in (1, 2, 5):
        agree(model, graph_of(model), [draw(n)])


def test_such_a_batch_is_not_split(model_of: ModelOf) -> None:
    why = why_not_split(graph_of(model_of(heads)), [(1, 4, 8, 8)])
    assert why is not None and "[2*N, 2, 64]" in why
