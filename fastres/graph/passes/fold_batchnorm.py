"""Conv2d then BatchNorm → one Conv2d.

w' = w * g, b' = beta + (b - mean) * g with g = gamma / sqrt(var + eps), per output channel.
Computed in float64 and rounded once to float32: folding in bf16 was reported to raise the error
about tenfold (PyTorch issues 145623 and 120545).

Refused where the convolution's result has another reader (or is an output): that reader wants it
unnormalised. A BatchNorm after anything but a Conv2d, such as the Add before a pre-activation
block, stays.
"""

from __future__ import annotations

import torch

from fastres.graph.ir import BatchNorm, Conv2d, Graph, Node
from fastres.graph.passes.merging import Merger


def fold_batchnorm(graph: Graph) -> Graph:
    merger = Merger(graph)
    for conv in graph.nodes:
        norm = merger.sole_reader(conv.name)
        if not isinstance(conv.op, Conv2d) or norm is None or not isinstance(norm.op, BatchNorm):
            continue
        if conv.op.epilogue.residual or conv.op.epilogue.activation or norm.op.activation:
            continue  # something stands between the two, or follows: not this pass's pattern
        weight, bias = _fold(graph, conv, norm)
        # constants of this node's own: a weight or a BatchNorm may be shared by several nodes
        names = {"weight": f"{conv.name}.folded_weight", "bias": f"{conv.name}.folded_bias"}
        merger.constants.update({names["weight"]: weight, names["bias"]: bias})
        merger.merge(conv, norm, conv.with_(params=names))
    return merger.finish()


def _fold(graph: Graph, conv: Node, norm: Node) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(norm.op, BatchNorm)

    def param(node: Node, slot: str) -> torch.Tensor | None:
        return graph.constants[node.params[slot]].double() if slot in node.params else None

    weight, mean, var = param(conv, "weight"), param(norm, "mean"), param(norm, "var")
    assert weight is not None and mean is not None and var is not None
    gamma, beta, bias = param(norm, "weight"), param(norm, "bias"), param(conv, "bias")
    scale = (var + norm.op.eps).rsqrt()
    scale = scale if gamma is None else scale * gamma
    shift = (-mean if bias is None else bias - mean) * scale
    shift = shift if beta is None else shift + beta
    was_double = graph.constants[conv.params["weight"]].dtype == torch.float64
    dtype = torch.float64 if was_double else torch.float32
    return (weight * scale[:, None, None, None]).to(dtype), shift.to(dtype)
