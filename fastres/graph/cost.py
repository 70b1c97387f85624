"""How much work a node is: multiply-adds and the least memory traffic, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fastres.graph.ir import Conv2d, Flatten, Graph, Linear, Node, Normalize, Slice
from fastres.options import Sizes

Shapes = Mapping[str, Sizes]


def multiply_adds(node: Node, shapes: Shapes, graph: Graph) -> int:
    """Multiplications, each with its addition, that a node needs; half its floating-point count.

    As the ResNet paper counts: a convolution has N*K*P*Q * (C/groups)*R*S, a linear layer
    (product of its output's sizes) * C. Biases, normalisation, activations, additions and pooling
    count nothing, and neither does an operation that the IR does not know.

    Source: He et al. 2015, table 1.
    """
    if not isinstance(node.op, Conv2d | Linear):
        return 0
    name = node.params["weight"]  # computed where it has not been folded yet
    weight = shapes[name] if name in shapes else graph.constants[name].shape
    return math.prod(shapes[node.name]) * math.prod(weight[1:])


def traffic(node: Node, shapes: Shapes, graph: Graph, itemsize: int) -> int:
    """Bytes that a node must move at least: every operand read once, the result written once.

    A slice reads what it keeps, a flattening moves nothing, and pictures are read in bytes.

    Args:
        itemsize: bytes of one element, of activations and parameters alike.
    """
    if isinstance(node.op, Flatten):
        return 0
    written = math.prod(shapes[node.name])
    if isinstance(node.op, Slice):
        return 2 * written * itemsize
    if isinstance(node.op, Normalize):
        return written * (1 + itemsize)
    read = sum(
        math.prod(shapes[name] if name in shapes else graph.constants[name].shape)
        for name in node.inputs
    )
    params = sum(graph.constants[name].numel() for name in node.params.values())
    return (read + params + written) * itemsize
