"""Convolutions, in two forms: over pointers, which takes every one, and over boxes, from sm_90 on.

`pointers.py` and `tma.py` launch, `pointers_jit.py` and `tma_jit.py` run on the GPU. The tile is
chosen in `fastres.kernels.tiles`: by `conv.py` for pointers, by `box_choice.py` for boxes.
"""

from fastres.kernels.conv2d.pointers import conv2d, conv2d_cost, conv2d_launch
from fastres.kernels.conv2d.tma import (
    conv2d_tma,
    conv2d_tma_cost,
    conv2d_tma_launches,
    pack_weight,
)

__all__ = [
    "conv2d",
    "conv2d_cost",
    "conv2d_launch",
    "conv2d_tma",
    "conv2d_tma_cost",
    "conv2d_tma_launches",
    "pack_weight",
]
