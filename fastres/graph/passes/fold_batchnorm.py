"""Conv2d or Linear, then BatchNorm → one Conv2d or Linear.

w' = w * g, b' = beta + (b - mean) * g with g = gamma / sqrt(var + eps), per output channel.
Computed in float64 and rounded once to float32: folding in bf16 was reported to raise the error
about tenfold (PyTorch issues 145623 and 120545).

Refused where the product has another reader (or is an output): that reader wants it unnormalised. A
BatchNorm after anything else, such as the Add before a pre-activation block, stays.
"""

from __future__ import annotations

import torch

from fastres.graph.ir import BatchNorm, Conv2d, Graph, Linear, Node
from fastres.graph.passes.merging import Merger

_AT_ONCE = 1 << 16  # numbers of a weight


def fold_batchnorm(graph: Graph) -> Graph:
    merger = Merger(graph)
    for product in graph.nodes:
        norm = merger.sole_reader(product.name)
        if norm is None or not isinstance(norm.op, BatchNorm) or norm.op.activation:
            continue
        if not _is_bare(product):
            continue  # something stands between the two: not this pass's pattern
        scale, shift = scale_and_shift(graph, norm)
        weight = graph.constants[product.params["weight"]]
        if "bias" in product.params:
            shift = shift + graph.constants[product.params["bias"]].double() * scale
        dtype = folded_dtype(weight)
        # constants of this node's own: a weight or a BatchNorm may be shared by several nodes
        names = {slot: f"{product.name}.folded_{slot}" for slot in ("weight", "bias")}
        merger.constants[names["weight"]] = _scaled(weight, scale, dtype)
        merger.constants[names["bias"]] = shift.to(dtype)
        merger.merge(product, norm, product.with_(params=names))
    return merger.finish()


def _is_bare(node: Node) -> bool:
    if isinstance(node.op, Conv2d):
        return not node.op.epilogue.residual and not node.op.epilogue.activation
    # of more than two dimensions, a Linear's channels are not those of a BatchNorm
    return isinstance(node.op, Linear) and not node.op.activation and len(node.spec.shape) == 2


def scale_and_shift(graph: Graph, norm: Node) -> tuple[torch.Tensor, torch.Tensor]:
    """A BatchNorm as y = x * scale + shift, by channel, in float64."""
    assert isinstance(norm.op, BatchNorm)
    found = {slot: graph.constants[name].double() for slot, name in norm.params.items()}
    scale = (found["var"] + norm.op.eps).rsqrt()
    if "weight" in found:
        scale = scale * found["weight"]
    shift = -found["mean"] * scale
    return scale, shift + found["bias"] if "bias" in found else shift


def folded_dtype(weight: torch.Tensor) -> torch.dtype:
    """To what a folded weight is rounded."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _scaled(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight * scale in float64, a few channels at a time: a copy in float64 is twice the weight,
    and what the allocator keeps of it is half the memory of compiling."""
    rows = max(1, _AT_ONCE // weight[0].numel())
    result = torch.empty(
        weight.shape, dtype=dtype, device="cpu"
    )  # contiguous, whatever the weight is
    pieces = (torch.split(x, rows) for x in (weight, scale, result))
    for part, factors, done in zip(*pieces, strict=True):
        done.copy_(part.double() * factors.view(-1, *[1] * (weight.dim() - 1)))
    return result
