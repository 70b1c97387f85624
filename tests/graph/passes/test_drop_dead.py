"""drop_dead: what nobody reads goes, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastres.graph.ir import Graph
from fastres.graph.passes.drop_dead import drop_dead
from fastres.graph.passes.pipeline import optimise

Make = Callable[..., Graph]
Run = Callable[..., Graph]
Lines = Callable[[Graph], list[str]]


def test_drops_what_nobody_reads(graph_of: Make, run_pass: Run, lines: Lines) -> None:
    def body(s: Any, x: Tensor) -> Any:
        s.b(s.n(x))
        return s.a(x)

    after = run_pass(drop_dead, graph_of(body))
    assert lines(after) == ["a"] and set(after.constants) == {"a.weight", "a.bias"}


def test_keeps_what_is_read(graph_of: Make, run_pass: Run) -> None:
    graph = graph_of(lambda s, x: (s.n(s.a(x)) * s.gain, s.a(x)))
    assert run_pass(drop_dead, graph).equals(graph)


def test_a_dead_reader_does_not_stand_in_the_way(
    graph_of: Make, run_pass: Run, lines: Lines
) -> None:
    def body(s: Any, x: Tensor) -> Any:
        y = s.a(x)
        y.sigmoid()
        return s.n(y)

    assert lines(run_pass(optimise, graph_of(body))) == ["a = a n"]
