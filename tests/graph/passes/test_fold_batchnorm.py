"""fold_batchnorm: a norm goes into the convolution before it, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.graph.capture import capture
from fastres.graph.ir import Graph
from fastres.graph.passes.drop_dead import drop_dead
from fastres.graph.passes.fold_batchnorm import fold_batchnorm
from fastres.graph.passes.fuse_activation import fuse_activation
from fastres.graph.passes.fuse_residual import fuse_residual
from fastres.options import Input

Forward = Callable[..., Any]
Make = Callable[..., Any]
Run = Callable[..., Graph]
Lines = Callable[[Graph], list[str]]


def two_readers(s: Any, x: Tensor) -> Any:
    y = s.a(x)
    return s.n(y) * y


def returned(s: Any, x: Tensor) -> Any:
    y = s.a(x)
    return s.n(y), y


def add_first(s: Any, x: Tensor) -> Any:
    return F.relu(s.n(s.a(x) + x))


FOLDED: dict[str, tuple[Forward, list[str]]] = {
    "conv, norm": (lambda s, x: s.n(s.a(x)), ["a = a n"]),
    "a chain": (lambda s, x: s.m(s.b(s.n(s.a(x)))), ["a = a n", "b = b m"]),
    "only the first norm": (lambda s, x: s.m(s.n(s.a(x))), ["a = a n", "m"]),
    "one norm after two convolutions": (
        lambda s, x: s.n(s.a(x)) * s.n(s.b(x)),
        ["a = a n", "b = b n_1", "mul"],
    ),
    "one convolution before two norms": (
        lambda s, x: s.n(s.a(x)) * s.m(s.a(x)),
        ["a = a n", "a_1 = a_1 m", "mul"],
    ),
    "norm, conv": (lambda s, x: s.a(s.n(x)), ["n", "a"]),
    "two readers": (two_readers, ["a", "n", "mul"]),
    "an output": (returned, ["a", "n"]),
    "norm after a sum": (add_first, ["a", "add", "n", "relu"]),
    "norm after an activation": (lambda s, x: s.n(F.relu(s.a(x))), ["a", "relu", "n"]),
    "norm after a pool": (lambda s, x: s.n(F.max_pool2d(s.a(x), 2)), ["a", "max_pool2d", "n"]),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folds(name: str, graph_of: Make, run_pass: Run, lines: Lines) -> None:
    body, want = FOLDED[name]
    after = drop_dead(run_pass(fold_batchnorm, graph_of(body)))
    assert lines(after) == want


def test_a_shared_weight_is_folded_twice(graph_of: Make, run_pass: Run) -> None:
    def share(model: Any) -> None:
        model.b.weight = model.a.weight

    graph = graph_of(lambda s, x: s.n(s.a(x)) * s.m(s.b(x)), share)
    assert graph["a"].params["weight"] == graph["b"].params["weight"]
    after = run_pass(fold_batchnorm, graph)
    weights = [after.constants[after[name].params["weight"]] for name in "ab"]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_kind(
    affine: bool, bias: bool, groups: int, graph_of: Make, run_pass: Run, lines: Lines
) -> None:
    def prepare(model: Any) -> None:
        model.a = nn.Conv2d(4, 4, 3, 2, 2, 2, groups, bias).double().eval()
        if not affine:
            model.n.register_parameter("weight", None)
            model.n.register_parameter("bias", None)

    after = run_pass(fold_batchnorm, graph_of(lambda s, x: s.n(s.a(x)), prepare))
    assert lines(after) == ["a = a n"]
    assert after["a"].params == {"weight": "a.folded_weight", "bias": "a.folded_bias"}


def test_not_behind_an_epilogue(graph_of: Make, run_pass: Run, lines: Lines) -> None:
    graph = fuse_activation(graph_of(lambda s, x: s.n(F.relu(s.a(x)))))
    assert lines(run_pass(fold_batchnorm, graph)) == ["a+relu = a relu", "n"]
    graph = fuse_residual(graph_of(lambda s, x: s.n(s.a(x) + x)))
    assert lines(run_pass(fold_batchnorm, graph)) == ["a+residual = a add", "n"]
    graph = fuse_activation(graph_of(lambda s, x: F.relu(s.n(s.a(x)))))
    assert lines(run_pass(fold_batchnorm, graph)) == ["a", "n+relu = n relu"]


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_rounds_once_to_float32(dtype: torch.dtype, kept: torch.dtype, block: Make) -> None:
    model = block(lambda s, x: s.n(s.a(x))).to(dtype)
    after = fold_batchnorm(capture(model, [Input((1, 4, 8, 8))]).graph)
    assert after.constants["a.folded_weight"].dtype == kept
    assert after["a"].spec.torch_dtype == dtype  # what the node computes is still the model's


@torch.no_grad()
def test_folding_in_bf16_would_lose_accuracy(block: Make) -> None:
    """In float64 the weights are rounded once; in bf16 every step rounds."""
    model = block(lambda s, x: s.n(s.a(x))).to(torch.bfloat16)
    found = fold_batchnorm(capture(model, [Input((1, 4, 8, 8))]).graph).constants
    w, n = model.a.weight, model.n
    scale = n.weight.double() / (n.running_var.double() + n.eps).sqrt()
    exact = w.double() * scale[:, None, None, None]
    bad = w * (n.weight / (n.running_var + n.eps).sqrt())[:, None, None, None]
    assert bad.dtype == torch.bfloat16

    def error(weight: Tensor) -> float:
        return float((weight.double() - exact).pow(2).mean().sqrt())

    once = error(found["a.folded_weight"].to(torch.bfloat16))  # as a bf16 kernel would take it
    assert error(found["a.folded_weight"]) < 1e-6 < once < 0.75 * error(bad)
