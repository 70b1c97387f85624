"""Cutting a graph between a backend and PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.backends.reference import ReferenceExecutable
from fastres.backends.segments import split
from fastres.graph.capture import capture
from fastres.graph.ir import Graph
from fastres.graph.laws import check


class Branches(nn.Module):
    """Two branches from one value, both read again later; a constant operand; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.register_buffer("offset", torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.a(x)
        left, right = self.b(a).relu(), torch.sigmoid(a) * 1.0
        return {"sum": left + right + self.offset, "left": left * a}


@pytest.fixture(scope="module")
def graph() -> Graph:
    return capture(Branches().eval(), [fastres.Input((2, 3, 5, 7))]).graph


def run(parts: tuple[Graph, ...], graph: Graph, x: Tensor) -> list[Tensor]:
    values = {graph.inputs[0].name: x}
    for part in parts:
        results = ReferenceExecutable(part, torch.float32).run(
            [values[v.name] for v in part.inputs]
        )
        values.update(zip(part.outputs, results, strict=True))
    return [values[name] for name in graph.outputs]


@pytest.mark.parametrize("period", [1, 2, 3, 4, 5, 100])
def test_any_cut_keeps_the_meaning(graph: Graph, period: int) -> None:
    refused = {node.name for i, node in enumerate(graph.nodes) if i % period == period - 1}
    segments = split(graph, refused)
    for segment in segments:
        check(segment.graph)
        assert {node.name in refused for node in segment.graph.nodes} == {segment.fallback}
    names = [node.name for segment in segments for node in segment.graph.nodes]
    assert sorted(names) == sorted(node.name for node in graph.nodes)
    x = torch.randn(2, 3, 5, 7)
    want = ReferenceExecutable(graph, torch.float32).run([x])
    got = run(tuple(s.graph for s in segments), graph, x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_more_segments_than_needed(graph: Graph) -> None:
    assert len(split(graph, set())) == 1
    assert len(split(graph, {node.name for node in graph.nodes})) == 1
    middle = {"sigmoid"}
    assert middle & {node.name for node in graph.nodes}
    assert len(split(graph, middle)) <= 3
