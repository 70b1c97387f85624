"""merge_slices: cuts of several dimensions, one after another, become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from fastres.graph.ir import Graph, Slice
from fastres.graph.passes.merge_slices import merge_slices

Forward = Callable[..., Any]
Make = Callable[..., Graph]
Run = Callable[..., Graph]
Lines = Callable[[Graph], list[str]]


def cut_then_read(s: Any, x: Tensor) -> Any:
    y = x[:, 1:]
    return y[:, :, ::2] * y[:, :, 1::2]


SLICED: dict[str, tuple[Forward, list[str]]] = {
    "height and width": (lambda s, x: x[:, :, ::2, ::2], ["slice = slice slice_1"]),
    "ends": (lambda s, x: x[:, 1:-1, 3:7], ["slice = slice slice_1"]),
    "three": (lambda s, x: x[:, 1:, ::2, 1:], ["slice = slice slice_1", "slice_2"]),
    "the same dimension": (lambda s, x: x[:, :, 1:][:, :, 2:], ["slice", "slice_1"]),
    "two readers": (cut_then_read, ["slice", "slice_1", "slice_2", "mul"]),
    "an output": (
        lambda s, x: (lambda y: (y, y[:, :, ::2]))(x[:, 1:]),
        ["slice", "slice_1"],
    ),
}


@pytest.mark.parametrize("name", SLICED)
def test_merges(name: str, graph_of: Make, run_pass: Run, lines: Lines) -> None:
    body, want = SLICED[name]
    assert lines(run_pass(merge_slices, graph_of(body))) == want


def test_both_cuts(graph_of: Make) -> None:
    graph = merge_slices(graph_of(lambda s, x: x[:, :, 1::2, :-3]))
    cut = Slice((0, 0, 1, 0), (None, None, None, -3), (1, 1, 2, 1))
    assert [node.op for node in graph] == [cut]
