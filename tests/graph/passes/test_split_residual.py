"""split_residual: the opposite of fuse_residual, with the value of every node kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.backends.reference import ReferenceExecutable
from fastres.graph import laws
from fastres.graph.ir import Add, Conv2d, Graph
from fastres.graph.passes.pipeline import optimise
from fastres.graph.passes.split_residual import split_residual


def residual(s: Any, x: Tensor) -> Any:
    y = F.relu(s.a(x) + x)
    return s.b(y) + y


def test_what_is_added_has_a_name(graph_of: Callable[..., Graph]) -> None:
    fused = optimise(graph_of(residual))
    split = laws.check(split_residual(fused), "split_residual")
    assert [n.name for n in fused.nodes] == ["a", "b"]
    assert [n.name for n in split.nodes] == ["a.main", "a", "b.main", "b"]
    assert [type(n.op) for n in split.nodes] == [Conv2d, Add, Conv2d, Add]
    assert split["a"].op == Add("relu") and split["b"].op == Add(None)
    assert split["a"].origins == fused["a"].origins
    assert split.outputs == fused.outputs
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    one, two = (ReferenceExecutable(g, torch.float64).values([x]) for g in (fused, split))
    torch.testing.assert_close(two["a"], one["a"])
    torch.testing.assert_close(two["b"], one["b"])
    assert two["a.main"].min() < 0 <= two["a"].min()  # before the activation, and without x


def test_others_are_left_alone(graph_of: Callable[..., Graph]) -> None:
    fused = optimise(graph_of(lambda s, x: F.relu(s.a(x))))
    assert split_residual(fused).equals(fused)
