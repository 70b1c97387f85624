"""Computes what depends on weights alone: FrozenBatchNorm's reshape, add, rsqrt, mul and sub.

In float64, from the weights to where an activation meets them, and rounded once.

Refused where the model returns the value: an output is always a node's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastres.graph import aten
from fastres.graph.ir import Activation, Add, Aten, Flatten, Graph, Mul, Node, Slice
from fastres.kernels import reference as meaning


def fold_constants(graph: Graph) -> Graph:
    exact: dict[str, torch.Tensor] = {}  # the values that are now known, unrounded
    kept: list[Node] = []
    for node in graph.nodes:
        known = all(name in exact or name in graph.constants for name in node.inputs)
        value = _value(node, graph.constants, exact) if known else None
        if value is None or node.name in graph.outputs:
            kept.append(node)
        else:
            exact[node.name] = value
    read = {name for node in kept for name in node.inputs}
    found = {
        name: value.to(graph.spec(name).torch_dtype)
        for name, value in exact.items()
        if name in read
    }
    return graph.replace(nodes=tuple(kept), constants={**graph.constants, **found})


@torch.no_grad()
def _value(
    node: Node, constants: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """None for an operation that no model applies to its weights."""

    def operand(name: str) -> torch.Tensor:
        if name in exact:
            return exact[name]
        tensor = constants[name]
        return tensor.double() if tensor.is_floating_point() else tensor

    inputs = [operand(name) for name in node.inputs]
    match node.op:
        case Aten():
            return aten.call(node.op, inputs)
        case Mul():
            return meaning.mul(inputs[0], inputs[1])
        case Add(activation):
            return meaning.add(inputs[0], inputs[1], activation)
        case Activation(kind):
            return meaning.activation(inputs[0], kind)
        case Slice(starts, stops, steps):
            return meaning.slice_(inputs[0], starts, stops, steps)
        case Flatten(start_dim):
            return meaning.flatten(inputs[0], start_dim)
        case _:
            return None
