"""read_batchnorm: a scale and a shift per channel are a BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from fastres.graph.ir import Graph
from fastres.graph.passes.fold_constants import fold_constants
from fastres.graph.passes.pipeline import optimise
from fastres.graph.passes.read_batchnorm import read_batchnorm

Forward = Callable[..., Any]
Make = Callable[..., Graph]
Run = Callable[..., Graph]
Lines = Callable[[Graph], list[str]]


def scale_read_twice(s: Any, x: Tensor) -> Any:
    y = x * s.gain[:, :, :1, :1]
    return (y + s.gain[:, :, :1, :1]) * y


READ: dict[str, tuple[Forward, list[str]]] = {
    "frozen norm": (lambda s, x: s.frozen(x), ["mul_2 = mul_2 add_1"]),
    "operands the other way": (
        lambda s, x: s.n.bias[:, None, None] + s.n.weight[:, None, None] * x,
        ["mul = mul add"],
    ),
    "a scale alone": (lambda s, x: x * s.gain[:, :, :1, :1], ["mul"]),
    "two readers": (scale_read_twice, ["mul", "add", "mul_1"]),
    "a scale per pixel": (lambda s, x: x * s.gain + s.n.bias[:, None, None], ["mul", "add"]),
    "a shift per pixel": (lambda s, x: x * s.n.bias[:, None, None] + s.gain, ["mul", "add"]),
    "a scale per column": (lambda s, x: x * s.gain[:, :1, :1] + s.gain, ["mul", "add"]),
    "one scale for all": (
        lambda s, x: x * s.gain[:, :1, :1, :1] + s.gain[:, :, :1, :1],
        ["mul", "add"],
    ),
    "a broadcast": (
        lambda s, x: x[:, :1] * s.gain[:, :, :1, :1] + s.gain[:, :, :1, :1],
        ["slice", "mul", "add"],
    ),
    "no constant": (lambda s, x: x * x + s.gain[:, :, :1, :1], ["mul", "add"]),
    "another rank": (
        lambda s, x: x.mean((2, 3)) * s.n.weight + s.n.bias,
        ["mean", "mul", "add"],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_reads(name: str, graph_of: Make, run_pass: Run, lines: Lines) -> None:
    body, want = READ[name]
    graph = fold_constants(graph_of(body))
    assert lines(run_pass(read_batchnorm, graph)) == want


def test_is_folded_like_any_other(graph_of: Make, run_pass: Run, lines: Lines) -> None:
    def body(s: Any, x: Tensor) -> Any:
        y = F.relu(s.frozen(s.a(x)))
        return F.relu(s.frozen(s.b(y), s.m) + x)

    after = run_pass(optimise, graph_of(body))
    assert [line.split(" = ")[0] for line in lines(after)] == ["a+relu", "b+residual+relu"]
    assert set(after.constants) == {
        f"{name}.folded_{slot}" for name in "ab" for slot in ("weight", "bias")
    }
