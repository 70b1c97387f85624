"""fold_constants: what depends on constants alone is computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastres.graph.capture import capture
from fastres.graph.ir import Add, Graph, Mul
from fastres.graph.passes.drop_dead import drop_dead
from fastres.graph.passes.fold_constants import fold_constants
from fastres.graph.passes.pipeline import optimise
from fastres.options import Input

Forward = Callable[..., Any]
Make = Callable[..., Any]
Run = Callable[..., Graph]
Lines = Callable[[Graph], list[str]]


def shift_returned(s: Any, x: Tensor) -> Any:
    shift = s.n.bias * 2.0
    return x + shift.view(-1, 1, 1), shift


def test_frozen_norm(graph_of: Make, run_pass: Run) -> None:
    graph = graph_of(lambda s, x: s.frozen(x))
    after = run_pass(fold_constants, graph)
    assert [type(node.op) for node in after] == [Mul, Add]
    assert len(graph.nodes) == len(after.nodes) + 9


@pytest.mark.parametrize(
    "body",
    [
        lambda s, x: x * s.gain[:, :1, ::2, -1:].relu().mean(),
        lambda s, x: x.mean((2, 3)) + (s.gain * s.gain).sigmoid().flatten(1)[:, :4],
        lambda s, x: x * torch.cat((s.gain, s.gain), 1)[:, 2:6],
    ],
    ids=["slice", "flatten", "concat"],
)
def test_other_operations(body: Forward, graph_of: Make, run_pass: Run) -> None:
    after = run_pass(fold_constants, graph_of(body))
    assert len(after.nodes) <= 4


def test_what_the_model_returns_stays(graph_of: Make, run_pass: Run, lines: Lines) -> None:
    after = run_pass(fold_constants, graph_of(shift_returned))
    assert lines(after) == ["mul", "add"]


def test_what_depends_on_the_batch_stays(graph_of: Make, run_pass: Run) -> None:
    graph = graph_of(lambda s, x: x * s.gain.expand(x.size(0), -1, -1, -1))
    assert str(run_pass(fold_constants, graph)) == str(graph)


def test_indices_stay_integers(graph_of: Make, run_pass: Run) -> None:
    graph = graph_of(lambda s, x: x * s.gain.argsort(1).flip(1))
    after = run_pass(fold_constants, graph)
    assert {str(t.dtype) for t in drop_dead(after).constants.values()} == {"torch.int64"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_once(dtype: torch.dtype, block: Make) -> None:
    def body(s: Any, x: Tensor) -> Any:
        return x + (s.gain + 1.0) * (1.0 / 3.0)

    model = block(body).to(dtype)
    graph = fold_constants(capture(model, [Input((1, 4, 8, 8))]).graph)
    found = drop_dead(graph).constants[graph["add_1"].inputs[1]]
    assert torch.equal(found, ((model.gain.double() + 1) / 3).to(dtype))


def test_without_values(graph_of: Make) -> None:
    graph = graph_of(lambda s, x: s.frozen(x))
    hollow = graph.replace(constants={k: t.to("meta") for k, t in graph.constants.items()})
    assert str(optimise(hollow)) == str(optimise(graph))
