"""What the tests of graphs share: networks that cost nothing, and the meaning of a graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fastres.backends.reference import ReferenceExecutable
from fastres.graph.ir import Graph

TOLERANCE = 1e-10  # of the largest value; float64 leaves some 1e-15 a layer


@pytest.fixture(scope="module", autouse=True)
def on_one_thread(one_thread: None) -> None:
    """For every test of graphs."""


@pytest.fixture(scope="session")
def hollow() -> Callable[..., nn.Module]:
    """hollow(factory, **options): a network all of whose weights are zeros, for its structure."""

    def make(factory: Callable[..., nn.Module], **options: Any) -> nn.Module:
        with torch.device("meta"):
            model = factory(**options)
        weights = {
            name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)  # one element in memory
            for name, tensor in model.state_dict().items()
        }
        model.load_state_dict(weights, assign=True)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """agree(model, graph, inputs): the graph means what the model does, in float64."""

    @torch.no_grad()
    def check(model: nn.Module, graph: Graph, inputs: Sequence[Tensor]) -> None:
        exact = [x.double() if x.is_floating_point() else x for x in inputs]
        # eval() anew: a copy of torchvision's feature extractor is in training mode
        want = copy.deepcopy(model).double().eval()(*[x.clone() for x in exact])
        leaves, tree = pytree.tree_flatten(want)
        assert graph.output_tree == tree
        before = [x.clone() for x in exact]
        # `values`, not `run`: that rounds to the model's own dtype
        values = ReferenceExecutable(graph, torch.float64).values(exact)
        values.update(zip((v.name for v in graph.inputs), exact, strict=True))
        assert all(map(torch.equal, exact, before)), "the graph changed its inputs"
        for name, leaf in zip(graph.outputs, leaves, strict=True):
            same(values[name], leaf)

    return check


def same(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    if want.is_floating_point():
        assert torch.isfinite(want).all() and want.abs().max() > 0
        assert (got - want).abs().max() <= TOLERANCE * want.abs().max()
    else:
        assert torch.equal(got, want)


@pytest.fixture(scope="session")
def unchanged() -> Callable[..., None]:
    """unchanged(before, after, inputs): two graphs mean the same, in float64."""

    def check(before: Graph, after: Graph, inputs: Sequence[Tensor]) -> None:
        exact = [x.double() for x in inputs]
        found = [ReferenceExecutable(g, torch.float64).values(exact) for g in (before, after)]
        for old, new in zip(before.outputs, after.outputs, strict=True):
            same(found[1][new], found[0][old])

    return check


class Model(nn.Module):
    """A forward of (module, *inputs), and what it uses."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.body = forward
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)

    def forward(self, *inputs: Tensor) -> Any:
        return self.body(self, *inputs)


@pytest.fixture(scope="session")
def model_of() -> Callable[..., nn.Module]:
    """model_of(forward, **parts): a model whose norms matter; forward takes it and the inputs."""

    def make(forward: Callable[..., Any], **parts: nn.Module | Tensor) -> nn.Module:
        torch.manual_seed(0)
        return Model(forward, **parts).eval()

    return make
