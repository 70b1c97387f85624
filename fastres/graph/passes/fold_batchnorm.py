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

_AT_ONCE = 1 << 16  # numbers of a weight


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

    weight = graph.constants[conv.params["weight"]]
    mean, var = param(norm, "mean"), param(norm, "var")
    assert mean is not None and var is not None
    gamma, beta, bias = param(norm, "weight"), param(norm, "bias"), param(conv, "bias")
    scale = (var + norm.op.eps).rsqrt()
    scale = scale if gamma is None else scale * gamma
    shift = (-mean if bias is None else bias - mean) * scale
    shift = shift if beta is None else shift + beta
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return _scaled(weight, scale, dtype), shift.to(dtype)


def _scaled(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight * scale in float64, a few channels at a time: a copy in float64 is twice the weight,
    and what the allocator keeps of it is half the memory of compiling."""
    rows = max(1, _AT_ONCE // weight[0].numel())
    result = torch.empty_like(weight, dtype=dtype)
    pieces = (torch.split(x, rows) for x in (weight, scale, result))
    for part, factors, done in zip(*pieces, strict=True):
        done.copy_(part.double() * factors[:, None, None, None])
    return result
