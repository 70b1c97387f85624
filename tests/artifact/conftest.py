"""What tests of saved engines share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastres.artifact.contents import Contents
from fastres.graph.ir import Conv2d, Graph, Node, Pad, Value
from fastres.graph.specs import Sym, TensorSpec
from fastres.graph.trees import LEAF
from fastres.options import Input, Options


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Contents]:
    """tiny(value=0.5): one padding and one convolution, small enough to damage it everywhere."""
    return _tiny


def _tiny(value: float = 0.5) -> Contents:
    shape, padded = (Sym("N"), 1, 4, 4), (Sym("N"), 1, 6, 6)
    weight = torch.tensor([1.0, -2.0, 3.0]).reshape(1, 1, 3, 1)
    graph = Graph(
        (Value("x", TensorSpec(shape)),),
        (
            Node("pad", Pad((0, 0, 1, 1), (0, 0, 1, 1), value), ("x",), TensorSpec(padded)),
            Node(
                "conv",
                Conv2d(),
                ("pad",),
                TensorSpec((Sym("N"), 1, 4, 6)),
                {"weight": "weight"},
            ),
        ),
        ("conv",),
        {"weight": weight},
        LEAF,
    )
    source = graph.replace(constants={"weight": weight.to("meta")})
    options = Options(backend=("reference",), precision="fp32")
    return Contents(graph, source, options, (Input((1, 1, 4, 4), torch.float32, name="x"),))
