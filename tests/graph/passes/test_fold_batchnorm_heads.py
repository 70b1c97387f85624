"""fold_batchnorm and fold_batchnorm_ahead: BatchNorm1d behind a Linear and in front of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres
from fastres.graph.capture import capture
from fastres.graph.ir import Graph
from fastres.graph.passes.fold_batchnorm import fold_batchnorm
from fastres.graph.passes.fold_batchnorm_ahead import fold_batchnorm_ahead
from fastres.options import Input

Forward = Callable[..., Any]
Make = Callable[..., Any]
Run = Callable[..., Graph]
Lines = Callable[[Graph], list[str]]


def normed(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """A BatchNorm of features, [N, C], with that layer's numbers."""
    mean, var = layer.running_mean, layer.running_var
    return F.batch_norm(x, mean, var, layer.weight, layer.bias, False, 0.1, layer.eps)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def features_read_twice(s: Any, x: Tensor) -> Tensor:
    y = normed(s.n, pooled(x))
    return s.fc(y) + y


def features_returned(s: Any, x: Tensor) -> Any:
    y = normed(s.n, pooled(x))
    return s.fc(y), y


BEHIND: dict[str, tuple[Forward, list[str]]] = {
    "linear, norm": (lambda s, x: normed(s.n, s.fc(pooled(x))), ["mean", "fc = fc batch_norm"]),
    "linear, relu, norm": (
        lambda s, x: normed(s.n, s.fc(pooled(x)).relu()),
        ["mean", "fc", "relu", "batch_norm"],
    ),
    "a linear over the last of four dimensions": (
        lambda s, x: s.n(F.linear(x, s.gain[0, 0])),
        ["linear", "n"],
    ),
}
AHEAD: dict[str, tuple[Forward, list[str]]] = {
    "norm, linear": (
        lambda s, x: s.fc(normed(s.n, pooled(x))),
        ["mean", "batch_norm = batch_norm fc"],
    ),
    "without a bias": (
        lambda s, x: F.linear(normed(s.n, pooled(x)), s.fc.weight),
        ["mean", "batch_norm = batch_norm linear"],
    ),
    "two in a row": (
        lambda s, x: s.fc(normed(s.m, s.fc(normed(s.n, pooled(x))))),
        ["mean", "batch_norm = batch_norm fc", "batch_norm_1 = batch_norm_1 fc_1"],
    ),
    "two readers": (features_read_twice, ["mean", "batch_norm", "fc", "add"]),
    "an output": (features_returned, ["mean", "batch_norm", "fc"]),
    "norm, relu, linear": (
        lambda s, x: s.fc(normed(s.n, pooled(x)).relu()),
        ["mean", "batch_norm", "relu", "fc"],
    ),
    "norm of maps": (lambda s, x: F.linear(s.n(x), s.gain[0, 0]), ["linear"]),
}


@pytest.mark.parametrize("name", BEHIND)
def test_behind(name: str, graph_of: Make, run_pass: Run, lines: Lines) -> None:
    body, want = BEHIND[name]
    assert [line for line in lines(run_pass(fold_batchnorm, graph_of(body)))][-len(want) :] == want


@pytest.mark.parametrize("name", AHEAD)
def test_ahead(name: str, graph_of: Make, run_pass: Run, lines: Lines) -> None:
    body, want = AHEAD[name]
    assert lines(run_pass(fold_batchnorm_ahead, graph_of(body)))[-len(want) :] == want


def test_rounded_once() -> None:
    torch.manual_seed(0)
    norm, fc = nn.BatchNorm1d(8), nn.Linear(8, 3)
    nn.init.uniform_(norm.running_mean, -1, 1)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    graph = capture(nn.Sequential(norm, fc).eval(), [Input((1, 8))]).graph
    after = fold_batchnorm_ahead(graph)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    (node,) = after.nodes
    weight = (fc.weight.double() * scale).float()
    bias = (fc.bias.double() - fc.weight.double() @ (norm.running_mean.double() * scale)).float()
    assert torch.equal(after.constants[node.params["weight"]], weight)
    assert torch.allclose(after.constants[node.params["bias"]], bias, rtol=1e-6, atol=1e-7)


HEADS: dict[str, Callable[[], list[nn.Module]]] = {
    "ArcFace": lambda: [nn.Linear(16, 8), nn.BatchNorm1d(8)],
    "fastai": lambda: [
        nn.BatchNorm1d(16),
        nn.Dropout(0.25),
        nn.Linear(16, 12),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(12),
        nn.Dropout(0.5),
        nn.Linear(12, 5),
    ],
    "projection": lambda: [
        nn.Linear(16, 12, bias=False),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Linear(12, 6, bias=False),
        nn.BatchNorm1d(6, affine=False),
    ],
    "last of all": lambda: [nn.Linear(16, 6), nn.ReLU(), nn.BatchNorm1d(6)],
    "alone": lambda: [nn.BatchNorm1d(16), nn.ReLU()],
}
NODES = {"ArcFace": 3, "fastai": 4, "projection": 4, "last of all": 4, "alone": 3}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_in_an_engine(name: str, backend: str) -> None:
    """Nothing is refused, and what can be folded is."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*body, *HEADS[name]()).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    x = torch.randn(4, 3, 10, 10)
    with fastres.compile(model, x, backend=backend) as engine:
        operations = [node for node in engine.graph if node.name not in ("1", "2", "flatten")]
        assert len([n for n in operations if type(n.op).__name__ != "Flatten"]) == NODES[name] - 1
        for batch in (x, x[:1]):
            assert torch.allclose(engine(batch), model(batch), rtol=1e-4, atol=1e-5)
