"""fuse_residual: a sum becomes the epilogue of the convolution that it adds to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.graph import laws
from fastres.graph.ir import Graph, Value
from fastres.graph.passes.fuse_activation import fuse_activation
from fastres.graph.passes.fuse_residual import fuse_residual
from fastres.graph.specs import TensorSpec

Forward = Callable[..., Any]
Make = Callable[..., Graph]
Run = Callable[..., Graph]
Lines = Callable[[Graph], list[str]]


def branches(s: Any, x: Tensor) -> Any:
    return s.a(x) + s.b(x)


def second_operand(s: Any, x: Tensor) -> Any:
    return x + s.a(x)


def conv_read_twice(s: Any, x: Tensor) -> Any:
    y = s.a(x)
    return (y + x) * y


def conv_returned(s: Any, x: Tensor) -> Any:
    y = s.a(x)
    return y + x, y


def block_after_block(s: Any, x: Tensor) -> Any:
    y = s.a(x) + x
    return s.b(y) + y


RESIDUAL: dict[str, tuple[Forward, list[str]]] = {
    "conv + x": (lambda s, x: s.a(x) + x, ["a+residual = a add"]),
    "x + conv": (second_operand, ["a+residual = a add"]),
    "the first of two branches": (branches, ["b", "a+residual = a add"]),
    "block after block": (block_after_block, ["a+residual = a add", "b+residual = b add_1"]),
    "three terms": (
        lambda s, x: s.a(x) + s.b(x) + x,
        ["b", "a+residual = a add", "add_1"],
    ),
    "twice itself": (lambda s, x: (lambda y: y + y)(s.a(x)), ["a", "add"]),
    "no convolution": (lambda s, x: x + x, ["add"]),
    "two readers": (conv_read_twice, ["a", "add", "mul"]),
    "an output": (conv_returned, ["a", "add"]),
    "an activation between": (lambda s, x: F.relu(s.a(x)) + x, ["a", "relu", "add"]),
    "a broadcast": (lambda s, x: s.a(x) + x.mean((2, 3), True), ["a", "mean", "add"]),
    "a broadcast convolution": (
        lambda s, x: x + s.a(x[:, :, :1, :1]),
        ["slice", "slice_1", "a", "add"],
    ),
    "a constant": (lambda s, x: s.a(x) + s.gain, ["a", "add"]),
    "a number": (lambda s, x: s.a(x) + 1, ["a", "add"]),
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_fuses(name: str, graph_of: Make, run_pass: Run, lines: Lines) -> None:
    body, want = RESIDUAL[name]
    assert lines(run_pass(fuse_residual, graph_of(body))) == want


def test_not_behind_an_activation(graph_of: Make, run_pass: Run, lines: Lines) -> None:
    graph = fuse_activation(graph_of(lambda s, x: F.relu(s.a(x)) + x))
    assert lines(run_pass(fuse_residual, graph)) == ["a+relu = a relu", "add"]
    graph = fuse_activation(graph_of(lambda s, x: F.relu(s.a(x) + x)))
    assert lines(run_pass(fuse_residual, graph)) == ["a", "add+relu = add relu"]


def test_a_constant_of_the_very_shape(graph_of: Make, lines: Lines) -> None:
    """Possible where the batch is fixed: an epilogue reads activations, not weights."""
    graph = graph_of(lambda s, x: s.a(x) + s.gain)
    spec = TensorSpec((1, 4, 8, 8), "float64")
    nodes = tuple(node.with_(spec=spec) for node in graph)
    fixed = laws.check(graph.replace(inputs=(Value("x", spec),), nodes=nodes))
    assert lines(fuse_residual(fixed)) == ["a", "add"]


def test_once_only(graph_of: Make, run_pass: Run, lines: Lines) -> None:
    graph = fuse_residual(graph_of(lambda s, x: s.a(x) + x + s.gain * x))
    assert lines(run_pass(fuse_residual, graph)) == ["a+residual = a add", "mul", "add_1"]


def test_of_another_dtype(graph_of: Make) -> None:
    def body(s: Any, x: Tensor) -> Any:
        return s.a(x) + x.to(torch.float32)

    assert "a" in [n.name for n in fuse_residual(graph_of(body)) if not n.origin]
