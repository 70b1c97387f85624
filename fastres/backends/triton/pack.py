"""Weights in the layout and dtype that the kernels read: KRSC convolutions, fp32 biases."""

from __future__ import annotations

import torch

from fastres.errors import UnsupportedError
from fastres.graph.ir import Conv2d, Graph, Linear
from fastres.weights import is_finite


def pack(graph: Graph, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """The constants that the plan's launches name, each rounded once.

    A convolution's weight [K, C/groups, R, S] becomes [K, R, S, C/groups]; biases stay fp32, they
    are added to the fp32 accumulator.

    Raises:
        UnsupportedError: a weight is beyond fp16's range.
    """
    packed: dict[str, torch.Tensor] = {}
    for node in graph.nodes:
        if not isinstance(node.op, Conv2d | Linear):
            continue
        weight = graph.constants[node.params["weight"]]
        if isinstance(node.op, Conv2d):
            weight = weight.permute(0, 2, 3, 1)
        rounded = weight.to(device, dtype)
        if dtype == torch.float16 and not is_finite(rounded):
            raise UnsupportedError(
                f"{node.name}: its weights, with BatchNorm folded in, exceed fp16's 65504; use "
                "precision='bf16' or 'fp32'"
            )
        packed[node.params["weight"]] = rounded.contiguous()
        if "bias" in node.params:
            bias = graph.constants[node.params["bias"]]
            packed[node.params["bias"]] = bias.to(device, torch.float32).contiguous()
    return packed
