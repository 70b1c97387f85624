"""What the tests of passes share: small networks, a pass run and checked, a graph in short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastres.graph import laws
from fastres.graph.capture import capture
from fastres.graph.ir import Conv2d, Graph, Node
from fastres.options import Input

Forward = Callable[..., Any]


class Block(nn.Module):
    """Layers to build small networks of; `body` says how."""

    def __init__(self, body: Forward) -> None:
        super().__init__()
        self.body = body
        self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1) for _ in "ab")
        self.n, self.m = norm(), norm()
        self.fc = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.rand(1, 4, 8, 8))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)

    def frozen(self, x: Tensor, layer: nn.BatchNorm2d | None = None) -> Tensor:
        """As torchvision's FrozenBatchNorm2d and detectron2's compute it."""
        layer = layer or self.n
        scale = layer.weight.reshape(1, -1, 1, 1)
        scale = scale * (layer.running_var.reshape(1, -1, 1, 1) + layer.eps).rsqrt()
        shift = layer.bias.reshape(1, -1, 1, 1) - layer.running_mean.reshape(1, -1, 1, 1) * scale
        return x * scale + shift


def norm() -> nn.BatchNorm2d:
    """A norm whose every term matters."""
    layer = nn.BatchNorm2d(4, eps=1e-3)
    for tensor, low in ((layer.weight, 0.5), (layer.bias, -0.5), (layer.running_mean, -0.5)):
        nn.init.uniform_(tensor, low, low + 1)
    nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return layer


@pytest.fixture
def block() -> Callable[[Forward], Block]:
    """block(body): the layers of a `Block` in eval(), put together by body(block, x)."""

    def make(body: Forward) -> Block:
        torch.manual_seed(0)
        return Block(body).eval()

    return make


@pytest.fixture
def graph_of(block: Callable[[Forward], Block]) -> Callable[..., Graph]:
    """graph_of(body, prepare): captured in float64, so that folding rounds nothing that matters."""

    def make(body: Forward, prepare: Callable[[Block], None] | None = None) -> Graph:
        model = block(body).double()
        if prepare is not None:
            prepare(model)
        return capture(model, [Input((1, 4, 8, 8))]).graph

    return make


@pytest.fixture
def run_pass(unchanged: Callable[..., None]) -> Callable[..., Graph]:
    """run_pass(step, graph): a pass, once: lawful, pure, and of the same meaning."""

    def run(step: Callable[[Graph], Graph], graph: Graph) -> Graph:
        text, constants = str(graph), dict(graph.constants)
        after = laws.check(step(graph), step.__name__)
        assert str(graph) == text and dict(graph.constants) == constants
        x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        unchanged(graph, after, [x])
        return after

    return run


@pytest.fixture
def lines() -> Callable[[Graph], list[str]]:
    """lines(graph): name, epilogue and origin of each node, such as `a+relu = a relu`."""

    def of(graph: Graph) -> list[str]:
        return [
            f"{node.name}{_epilogue(node)}" + (f" = {' '.join(node.origin)}" if node.origin else "")
            for node in graph
        ]

    return of


def _epilogue(node: Node) -> str:
    if isinstance(node.op, Conv2d):
        return str(node.op.epilogue)
    activation = getattr(node.op, "activation", None)
    return f"+{activation}" if activation else ""
