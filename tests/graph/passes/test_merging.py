"""merging: a node stands where its last operand is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastres.graph.ir import Graph
from fastres.graph.passes.merging import Merger
from fastres.graph.passes.pipeline import optimise

Make = Callable[..., Graph]
Run = Callable[..., Graph]
Lines = Callable[[Graph], list[str]]


def test_a_later_operand(graph_of: Make, run_pass: Run, lines: Lines) -> None:
    def body(s: Any, x: Tensor) -> Any:
        y = s.a(x)
        z = s.b(x)
        return y + F.relu(z)

    after = run_pass(optimise, graph_of(body))
    assert lines(after) == ["b+relu = b relu", "a+residual = a add"]


def test_readers_and_outputs_are_renamed(graph_of: Make, run_pass: Run) -> None:
    def body(s: Any, x: Tensor) -> Any:
        y = F.relu(s.n(s.a(x)))
        return y, y * y

    after = run_pass(optimise, graph_of(body))
    assert after.outputs == ("a", "mul") and after["mul"].inputs == ("a", "a")


def test_nothing_to_merge(graph_of: Make) -> None:
    graph = graph_of(lambda s, x: x * x)
    assert Merger(graph).finish().equals(graph)


def test_what_is_gone_has_no_reader(graph_of: Make) -> None:
    graph = graph_of(lambda s, x: s.n(s.a(x)))
    merger = Merger(graph)
    assert merger.sole_reader("a") is graph["n"] and not merger.taken("a")
    merger.merge(graph["a"], graph["n"], graph["a"])
    assert merger.sole_reader("a") is None
    assert merger.taken("a") and merger.taken("n")
