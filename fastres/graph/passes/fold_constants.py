"""Computes what depends on weights alone: FrozenBatchNorm's scale and shift, normalised weights,
pruning masks, weights that a model standardises or divides by their spectral norm.

In float64, from the weights to where an activation meets them, and rounded once; what a call
rounds to another dtype is rounded there, as the model has it. Where weights are rounded to steps or
compared, more bits would decide otherwise (0.1 in fp32 is more than 0.1): what differs from the
result in the model's own dtype by more than its rounding is taken from there, and so is what has no
float64.

Refused where the model returns the value: an output is always a node's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastres.errors import GraphError, first_line
from fastres.graph import aten
from fastres.graph.ir import Activation, Add, Aten, Flatten, Graph, Mul, Node, Slice
from fastres.kernels import reference as meaning

_ROUNDINGS = 64  # a result's error in its own dtype, in units of its largest value's last bit
_FOLDED = Activation | Add | Aten | Flatten | Mul | Slice  # all that capture makes of constants


def fold_constants(graph: Graph) -> Graph:
    known = set(graph.constants)
    fixed: list[Node] = []
    kept: list[Node] = []
    for node in graph.nodes:
        if isinstance(node.op, _FOLDED) and known.issuperset(node.inputs):
            known.add(node.name)
            fixed.append(node)
        if node.name not in known or node.name in graph.outputs:
            kept.append(node)
    if not fixed:
        return graph
    needed = {name for node in kept for name in (*node.inputs, *node.params.values())}
    values = _values(graph, fixed, needed)
    # what the model returns and computes with as well is a node and a constant
    names = {name: f"{name}.value" for name in values if name in graph.outputs}
    nodes = tuple(_reading(node, names) for node in kept)
    found = {names.get(name, name): value for name, value in values.items()}
    return graph.replace(nodes=nodes, constants={**graph.constants, **found})


def _reading(node: Node, names: Mapping[str, str]) -> Node:
    if not names:
        return node
    params = {slot: names.get(name, name) for slot, name in node.params.items()}
    return node.with_(inputs=tuple(names.get(n, n) for n in node.inputs), params=params)


@torch.no_grad()
def _values(graph: Graph, fixed: list[Node], needed: set[str]) -> dict[str, torch.Tensor]:
    """Those needed, rounded; all others are let go of after their last use."""
    last = {name: node.name for node in fixed for name in node.inputs}
    own: dict[str, torch.Tensor] = {}  # as the model computes them
    exact: dict[str, torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}
    for node in fixed:
        try:
            own[node.name] = _value(graph, node, own, exact=False)
        except RuntimeError as error:  # PyTorch's, which the model would raise as well
            raise GraphError(f"{node.name} cannot be computed: {first_line(error)}") from error
        try:
            exact[node.name] = _value(graph, node, exact, exact=True)
        except RuntimeError:  # an operator without float64
            exact[node.name] = own[node.name]
        if node.name in needed:
            rounded = exact[node.name].to(node.spec.torch_dtype)
            found[node.name] = own[node.name] if _decided(own[node.name], rounded) else rounded
        for name in {*node.inputs, node.name}:
            if last.get(name, node.name) == node.name:
                own.pop(name, None)
                exact.pop(name, None)
    return found


def _decided(own: torch.Tensor, rounded: torch.Tensor) -> bool:
    """Whether two results differ by more than rounding explains."""
    if not own.is_floating_point() or own.is_meta:
        return True
    largest = own.abs().max() if own.numel() else own.new_zeros(())
    bound = _ROUNDINGS * torch.finfo(own.dtype).eps * largest
    return bool(((own - rounded).abs() > bound).any())


def _value(
    graph: Graph, node: Node, known: Mapping[str, torch.Tensor], exact: bool
) -> torch.Tensor:
    declared = {name: graph.spec(name).torch_dtype for name in node.inputs}
    dtypes = {*declared.values(), node.spec.torch_dtype}
    rounds = len([dtype for dtype in dtypes if dtype.is_floating_point]) > 1

    def operand(name: str) -> torch.Tensor:
        tensor = known[name] if name in known else graph.constants[name]
        if rounds or not exact:
            return tensor.to(declared[name])
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
    raise AssertionError(f"{node.name} is no operation that is folded")
