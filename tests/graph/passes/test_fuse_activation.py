"""fuse_activation: an activation goes into the node before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.graph.ir import Activation, Conv2d, Graph, Linear
from fastres.graph.passes.fuse_activation import fuse_activation
from fastres.graph.passes.fuse_residual import fuse_residual
from fastres.kernels.epilogue import Epilogue

Forward = Callable[..., Any]
Make = Callable[..., Graph]
Run = Callable[..., Graph]
Lines = Callable[[Graph], list[str]]


def relu_twice(s: Any, x: Tensor) -> Any:
    y = s.a(x)
    return F.relu(y) * torch.sigmoid(y)


def before_and_after(s: Any, x: Tensor) -> Any:
    y = s.a(x)
    return F.relu(y), y


ACTIVATED: dict[str, tuple[Forward, list[str]]] = {
    "conv": (lambda s, x: F.relu(s.a(x)), ["a+relu = a relu"]),
    "sum": (lambda s, x: F.silu(x + x), ["add+silu = add silu"]),
    "norm": (lambda s, x: F.gelu(s.n(x)), ["n+gelu = n gelu"]),
    "linear": (
        lambda s, x: s.fc(x.mean((2, 3))).sigmoid(),
        ["mean", "fc+sigmoid = fc sigmoid"],
    ),
    "hardswish": (lambda s, x: F.hardswish(s.a(x)), ["a+hardswish = a hardswish"]),
    "a chain": (
        lambda s, x: F.relu(s.b(F.silu(s.a(x)))),
        ["a+silu = a silu", "b+relu = b relu"],
    ),
    "one of two in a row": (
        lambda s, x: F.relu(F.silu(s.a(x))),
        ["a+silu = a silu", "relu"],
    ),
    "two readers": (relu_twice, ["a", "relu", "sigmoid", "mul"]),
    "an output": (before_and_after, ["a", "relu"]),
    "nothing to fuse with": (lambda s, x: F.relu(x * x), ["mul", "relu"]),
    "on the input": (lambda s, x: F.relu(x), ["relu"]),
    "after a pool": (
        lambda s, x: F.relu(F.max_pool2d(s.a(x), 2)),
        ["a", "max_pool2d", "relu"],
    ),
}


@pytest.mark.parametrize("name", ACTIVATED)
def test_fuses(name: str, graph_of: Make, run_pass: Run, lines: Lines) -> None:
    body, want = ACTIVATED[name]
    assert lines(run_pass(fuse_activation, graph_of(body))) == want


@pytest.mark.parametrize(
    "body",
    [
        lambda s, x: F.relu(F.silu(s.a(x))),
        lambda s, x: F.relu(F.silu(x + x)),
        lambda s, x: F.relu(F.silu(s.n(x))),
        lambda s, x: F.relu(F.silu(s.fc(x.mean((2, 3))))),
    ],
    ids=["conv", "sum", "norm", "linear"],
)
def test_again_changes_nothing(body: Forward, graph_of: Make, run_pass: Run) -> None:
    graph = fuse_activation(graph_of(body))
    assert str(run_pass(fuse_activation, graph)) == str(graph)


def test_behind_a_residual(graph_of: Make, run_pass: Run, lines: Lines) -> None:
    graph = fuse_residual(graph_of(lambda s, x: F.relu(s.a(x) + x)))
    after = run_pass(fuse_activation, graph)
    assert lines(after) == ["a+residual+relu = a add relu"]
    assert after["a"].op == Conv2d(padding=(1, 1), epilogue=Epilogue(True, "relu"))


def test_linear_takes_an_activation_once(graph_of: Make) -> None:
    graph = graph_of(lambda s, x: F.relu(F.relu(s.fc(x.mean((2, 3))))))
    fused = fuse_activation(graph)
    assert [n.op for n in fused][1:] == [Linear("relu"), Activation("relu")]
