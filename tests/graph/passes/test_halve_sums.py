"""halve_sums: the same network in float64, in two convolutions where a sum is long and can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.backends.reference import ReferenceExecutable
from fastres.graph import laws
from fastres.graph.capture import capture
from fastres.graph.ir import Conv2d, Graph
from fastres.graph.passes.halve_sums import SHORT_SUM, halve_sums
from fastres.graph.passes.pipeline import optimise
from fastres.options import Input

SIZES = (2, 70, 7, 5)


class Block(nn.Module):
    """A convolution with whatever may follow it."""

    def __init__(self, residual: bool = False, relu: bool = False, **conv: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(SIZES[1], SIZES[1], **{"kernel_size": 3, "padding": 1, **conv})
        self.residual, self.relu = residual, relu

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        y = y + x if self.residual else y
        return y.relu() if self.relu else y


def graph_of(block: nn.Module) -> Graph:
    return optimise(capture(block.eval(), [Input(SIZES)]).graph)


def close(found: Tensor, exact: Tensor) -> bool:
    """Outputs are float32: one rounding, of what was computed in float64."""
    return torch.equal(found, exact.float()) or bool((found - exact).abs().max() < 1e-6)


def convolutions(graph: Graph) -> list[Conv2d]:
    return [node.op for node in graph.nodes if isinstance(node.op, Conv2d)]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"relu": True},
        {"residual": True, "relu": True},
        {"residual": True, "bias": False},
        {"stride": 2, "relu": True},
        {"stride": (1, 3), "padding": (0, 2)},
        {"dilation": 2, "padding": 3},
        {"padding": (1, 0)},  # along the rows then
        {"kernel_size": (4, 3)},
        {"kernel_size": (3, 5)},
    ],
    ids=str,
)
def test_the_same_numbers_in_two_shorter_sums(how: dict[str, Any]) -> None:
    block = Block(**how)
    before = graph_of(block)
    after = laws.check(halve_sums(before), "halve_sums")
    assert len(convolutions(before)) == 1 and len(convolutions(after)) == 2
    assert len(after.nodes) == len(before.nodes) + 1 and after.outputs == before.outputs
    weights = [after.constants[n.params["weight"]] for n in after.nodes if "weight" in n.params]
    whole = block.conv.weight.numel()
    assert sum(weight.numel() for weight in weights) == whole
    assert max(weight.numel() for weight in weights) == whole * 2 // 3
    x = torch.randn(SIZES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found,) = ReferenceExecutable(after, torch.float64).run([x])
    with torch.no_grad():
        assert close(found, block.double()(x))


@pytest.mark.parametrize(
    "how",
    [
        {"kernel_size": 1, "padding": 0},
        {"kernel_size": 5, "padding": 2},
        {"padding": 0},
        {"groups": 2},
        {"dilation": 2},
    ],
    ids=str,
)
def test_what_has_no_such_halves_is_left(how: dict[str, Any]) -> None:
    before = graph_of(Block(**how))
    assert halve_sums(before).nodes == before.nodes


def test_short_sums_are_left() -> None:
    torch.manual_seed(0)
    few, many = nn.Conv2d(64, 8, 3, padding=1), nn.Conv2d(65, 8, 3, padding=1)
    assert few.weight[0].numel() == SHORT_SUM < many.weight[0].numel()
    for conv, parts in ((few, 1), (many, 2)):
        shape = (1, conv.in_channels, 4, 4)
        graph = optimise(capture(conv.eval(), [Input(shape)]).graph)
        assert len(convolutions(halve_sums(graph))) == parts


def test_a_weight_that_two_layers_share() -> None:
    block = Block(relu=True).eval()
    twice = nn.Sequential(block, block).eval()
    graph = halve_sums(graph_of(twice))
    assert len(convolutions(graph)) == 4
    x = torch.randn(SIZES, dtype=torch.float64)
    (found,) = ReferenceExecutable(graph, torch.float64).run([x])
    with torch.no_grad():
        assert close(found, twice.double()(x))


def test_openvino_rounds_less_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The RMS error of one layer of 512 channels, of the order of 0.75 of what it is in one sum."""
    torch.manual_seed(0)
    layer = nn.Conv2d(512, 64, 3, padding=1, bias=False).eval()
    x = torch.randn(2, 512, 9, 9)
    with torch.no_grad():
        exact = layer.double()(x.double())
    layer.float()

    def error() -> float:
        with fastres.compile(layer, x, backend="cpu") as engine:
            return float((engine(x) - exact).square().mean().sqrt())

    halved = error()
    monkeypatch.setattr("fastres.backends.cpu.halve_sums", lambda graph: graph)
    assert halved < 0.9 * error()
