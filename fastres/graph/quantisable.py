"""What of a graph may be quantised: which nodes, which of their operands, and by whose scale."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import msgspec
import torch

from fastres.graph.ir import (
    Activation,
    Add,
    Aten,
    AvgPool,
    Concat,
    Conv2d,
    Flatten,
    Graph,
    Linear,
    MaxPool,
    Node,
    Normalize,
    Pad,
    Slice,
)
from fastres.graph.passes.split_residual import MAIN

LOWEST = -1e30  # what calibration takes for no number any more; a padding with it never wins
_MASK = -1e4  # what half precision can still hold where minus infinity is meant


def quantisable(node: Node) -> bool:
    """Whether a node multiplies by weights that may be int8."""
    return isinstance(node.op, Conv2d | Linear) and node.spec.torch_dtype.is_floating_point


def keeps_steps(node: Node) -> bool:
    """Whether every result is one of the operand's values, or zero: it needs no scale of its own"""
    return isinstance(node.op, MaxPool | Flatten | Slice) or (
        isinstance(node.op, Pad) and node.op.value == 0
    )


def layer_of(name: str) -> str:
    """The node of the fused graph that a node of the split graph belongs to."""
    return name.removesuffix(MAIN)


def operands(graph: Graph, node: Node) -> tuple[str, ...]:
    """The values that a node reads in int8 when it is quantised: none, or all but constants.

    An Add takes part if both of its operands do: they are values of one shape.
    """
    if quantisable(node):
        return tuple(name for name in node.inputs if name not in graph.constants)
    if isinstance(node.op, Add) and len({graph.spec(name) for name in node.inputs}) == 1:
        return () if set(node.inputs) & set(graph.constants) else node.inputs
    return ()


def path(graph: Graph, name: str) -> tuple[str, ...]:
    """From the value whose scale holds to `name`, through nodes that keep its steps.

    A padding or a mask of minus infinity, or of numbers that stand for it, is there to lose in a
    max pool, and what holds it has no range. Then the path begins with the pool.
    """
    found = [name]
    while found[0] in graph and keeps_steps(graph[found[0]]):
        found.insert(0, graph[found[0]].inputs[0])
    pools = [i for i, n in enumerate(found) if n in graph and isinstance(graph[n].op, MaxPool)]
    return tuple(found[pools[0] :] if pools and _is_filled(graph, found[0]) else found)


def _is_filled(graph: Graph, name: str) -> bool:
    """Whether a value was padded or masked with what loses in a max pool."""
    if name not in graph:
        return False
    node = graph[name]
    joined = node.inputs if isinstance(node.op, Add | Concat | Aten) else ()
    return _fills(node) or any(
        _fills(graph[read]) if read in graph else _is_low(graph.constants.get(read))
        for read in joined
    )


def _fills(node: Node) -> bool:
    if isinstance(node.op, Aten):
        return any(number <= _MASK for number in _numbers(msgspec.json.decode(node.op.args)))
    return isinstance(node.op, Pad) and node.op.value < 0


def _is_low(constant: torch.Tensor | None) -> bool:
    if constant is None or not constant.is_floating_point() or not constant.numel():
        return False
    return bool(constant.min() <= _MASK)


def _numbers(args: Any) -> Iterator[float]:
    """Of a call's arguments, as `fastres.graph.aten` writes them down."""
    if isinstance(args, list):
        for arg in args:
            yield from _numbers(arg)
    elif isinstance(args, dict) and "float" in args:
        yield float(args["float"])
    elif isinstance(args, int | float):
        yield float(args)


def never_negative(graph: Graph) -> set[str]:
    """What a ReLU gave, and what pools, slices, paddings and concatenations made of that."""
    found: set[str] = set()
    for node in graph.nodes:
        op = node.op
        if isinstance(op, Activation):
            holds = op.kind == "relu"
        elif isinstance(op, MaxPool | AvgPool | Slice | Flatten | Concat):
            holds = found.issuperset(node.inputs)
        elif isinstance(op, Pad):
            holds = node.inputs[0] in found and (op.value >= 0 or op.value <= LOWEST)
        else:
            holds = getattr(getattr(op, "epilogue", op), "activation", None) == "relu"
        if holds:
            found.add(node.name)
    return found


def observed(graph: Graph) -> dict[str, bool]:
    """The values that calibration looks at, in the graph's order.

    Args:
        graph: with residuals split.

    Returns:
        Name → whether a convolution or linear layer reads it, so that channel means are of use.
    """
    wanted: dict[str, bool] = {}
    for node in graph.nodes:
        for name in operands(graph, node):
            wanted.setdefault(path(graph, name)[0], False)
            if quantisable(node) and name == node.inputs[0]:
                wanted[name] = True
    order = [value.name for value in graph.inputs] + [node.name for node in graph.nodes]
    return {name: wanted[name] for name in order if name in wanted}


def calibration_names(graph: Graph) -> dict[str, str]:
    """Names in which graphs differ that share tables: the normalised picture is the input."""
    node = graph.normalize
    return {} if node is None else {node.name: node.inputs[0]}


def fingerprints(graph: Graph) -> tuple[str, str]:
    """SHA-256 of an optimised graph's structure and of its weights, in hexadecimal.

    Sizes and a normalisation in front are left out: they change nothing in what a table says.
    """
    names = calibration_names(graph)
    structure = [
        (node.name, node.op, [names.get(n, n) for n in node.inputs], node.params)
        for node in graph.nodes
        if not isinstance(node.op, Normalize)
    ]
    outputs = [names.get(n, n) for n in graph.outputs]
    text = msgspec.json.encode([structure, outputs], order="sorted")
    weights = hashlib.sha256()
    for name in sorted(graph.constants):
        tensor = graph.constants[name].detach().cpu().contiguous()
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        weights.update(tensor.flatten().view(torch.uint8).numpy().data)
    return hashlib.sha256(text).hexdigest(), weights.hexdigest()
