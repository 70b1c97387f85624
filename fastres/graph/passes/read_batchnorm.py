"""x * scale then + shift, one constant value per channel → BatchNorm, which can then be folded.

Mean 0, variance 1 and eps 0: y = scale * (x - 0) / sqrt(1 + 0) + shift.

Refused where the product has another reader, or where a constant has more than one value per
channel.
"""

from __future__ import annotations

import torch

from fastres.graph.ir import Add, BatchNorm, Graph, Mul, Node
from fastres.graph.passes.merging import Merger


def read_batchnorm(graph: Graph) -> Graph:
    merger = Merger(graph)
    for mul in graph.nodes:
        add = merger.sole_reader(mul.name)
        if add is None or not isinstance(mul.op, Mul) or not isinstance(add.op, Add):
            continue
        scale, shift = _per_channel(graph, mul), _per_channel(graph, add)
        if add.op.activation is not None or scale is None or shift is None:
            continue
        x = next(name for name in mul.inputs if name not in graph.constants)
        parts = {
            "weight": scale,
            "bias": shift,
            "mean": torch.zeros_like(scale),
            "var": torch.ones_like(scale),
        }
        params = {slot: f"{mul.name}.{slot}" for slot in parts}
        merger.constants.update((params[slot], part) for slot, part in parts.items())
        norm = mul.with_(op=BatchNorm(eps=0.0), inputs=(x,), params=params)
        merger.merge(mul, add, norm)
    return merger.finish()


def _per_channel(graph: Graph, node: Node) -> torch.Tensor | None:
    """The constant operand as [C], if it has one value for each channel of [N, C, H, W]."""
    shape = node.spec.shape
    names = [name for name in node.inputs if name in graph.constants]
    if len(names) != 1 or len(shape) != 4:
        return None
    x = next(name for name in node.inputs if name != names[0])
    tensor = graph.constants[names[0]]
    fits = tuple(tensor.shape) in ((1, shape[1], 1, 1), (shape[1], 1, 1))
    return tensor.flatten() if fits and graph.spec(x).shape == shape else None
