"""Memory for a product whose depth is split: the parts of its sums, and how many of each are there.

`boxes.workspace_bytes` and `boxes.counter_bytes` say how much of it a tile needs.
"""

from __future__ import annotations

from typing import Any

import torch

from fastres.kernels.geometry import ConvShape
from fastres.kernels.launch import check_like
from fastres.kernels.tiles.boxes import BoxTile, Projection, counter_bytes, workspace_bytes


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the parts of a sum of such products are kept in."""
    return torch.int32 if dtype == torch.int8 else torch.float32


def new_parts(
    shape: ConvShape, tile: BoxTile, x: torch.Tensor, projection: Projection | None = None
) -> dict[str, Any]:
    """The arguments `workspace` and `counters` of `conv2d_tma_launches`, on the device of x."""
    size, sums = (count(shape, tile, projection) // 4 for count in (workspace_bytes, counter_bytes))
    return {
        "workspace": torch.empty(size, dtype=sum_dtype(x.dtype), device=x.device),
        "counters": torch.zeros(sums, dtype=torch.int32, device=x.device),
    }


def room_in(
    name: str,
    memory: torch.Tensor | None,
    size: int,
    dtype: torch.dtype,
    tile: BoxTile,
    x: torch.Tensor,
) -> torch.Tensor:
    """The first so many bytes of what was given, as a vector.

    Raises:
        ValueError: there is no such memory or too little, or it does not go with x.
    """
    count = size // 4
    if memory is None or memory.numel() < count:
        found = "missing" if memory is None else f"of {memory.numel()} elements"
        kind = "int32" if dtype == torch.int32 else "fp32"
        raise ValueError(f"{name} is {found}, expected {count} {kind} for tile {tile}")
    check_like(name, memory, memory.shape, x, [dtype])
    return memory.view(-1)[:count]
