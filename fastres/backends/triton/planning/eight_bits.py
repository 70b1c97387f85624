"""A quantised graph without its Quantize and Dequantize nodes, and how its values lie in memory.

The planner reads the plain graph, which has the shape of the floating-point one, so that regions
and forms are found as ever. Beside it stands which values are read in 8 bits, and by what scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastres.graph.ir import Dequantize, Graph, Node, Quantize
from fastres.graph.passes.merging import rename_inputs
from fastres.kernels.epilogue import ActivationKind
from fastres.options import DTYPE_OF, Precision

# What floating-point values are kept in: around int8 layers, what tensor cores are fast in.
FLOAT_OF: dict[Precision, torch.dtype] = {**DTYPE_OF, "int8": torch.float16, "fp8": torch.float16}
FLOATS: dict[Precision, Precision] = {"int8": "fp16", "fp8": "fp16"}  # where that is another one
# What a problem's operands are of.
OPERAND_OF: dict[Precision, torch.dtype] = {
    **DTYPE_OF,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


def inverse(scale: float | None) -> float:
    """What a result is multiplied by: a float32; 1 of a floating-point one."""
    return 1.0 if scale is None else float(1 / torch.tensor(scale, dtype=torch.float32))


def around(scale: float | None, activation: ActivationKind | None) -> tuple[float, float]:
    """What is multiplied before an activation, and behind it, for a result of this scale.

    Before it, it is part of what sums, biases and residuals are multiplied by anyway. A ReLU allows
    that, and none: max(0, v) * f is max(0, v * f), for f > 0.
    """
    factor = inverse(scale)
    return (factor, 1.0) if activation in (None, "relu") else (1.0, factor)


@dataclass(frozen=True)
class Plain:
    """A graph without pairs of Quantize and Dequantize.

    Args:
        scales: of every value that its readers read in 8 bits; nobody but the caller of the network
            reads it in floating point.
    """

    graph: Graph
    scales: Mapping[str, float]


def plain(graph: Graph) -> Plain:
    """Takes the pairs out; a graph that is not quantised stays as it is."""
    scales: dict[str, float] = {}
    names: dict[str, str] = {}  # of quantised and dequantised values → the value's
    for node in graph.nodes:
        if isinstance(node.op, Quantize):
            scales[node.inputs[0]] = node.op.scale
            names[node.name] = node.inputs[0]
        elif isinstance(node.op, Dequantize):
            names[node.name] = names[node.inputs[0]]
    if not scales:
        return Plain(graph, scales)
    nodes = [rename_inputs(node, names) for node in graph.nodes if node.name not in names]
    return Plain(graph.replace(nodes=tuple(nodes)), scales)


def is_whole(node: Node) -> bool:
    """Whether a convolution or linear layer multiplies 8 bits by 8 bits."""
    return "scale" in node.params


def precision_of(node: Node, precision: Precision) -> Precision:
    """In which a node of a graph of this precision computes."""
    return precision if is_whole(node) else FLOATS.get(precision, precision)
