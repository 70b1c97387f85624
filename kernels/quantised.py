"""What 8-bit operands bring to a launch: the scales of its epilogue, checked, as arguments.

v = acc * scale[k] + bias[k] + residual * residual_scale; y = act(v) * out_scale, each step one fp32
operation; see `reference.finish_int8`. int8 is rounded half to even and saturated to -128 to 127,
fp8 e4m3 saturated to -448 to 448. The zero point is 0, and so is the padding.
"""

from __future__ import annotations

import math

import torch

from fastres.kernels.cost import Target
from fastres.kernels.launch import BYTE_DTYPES, FLOAT_DTYPES, Argument, check_like
from fastres.kernels.tiles.depth import summed_by_steps

ANY_DTYPES = (*FLOAT_DTYPES, *BYTE_DTYPES)
_DEEPEST = 2**17 - 1  # products of up to 2**14 each in an int32
_LEAST, _MOST = 2.0**-126, 2.0**127  # normal numbers of fp32


def is_bytes(dtype: torch.dtype) -> bool:
    """Whether products of this type are those of 8 bits."""
    return dtype in BYTE_DTYPES


def result_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What a kernel may write whose operands are of `dtype`: the same, or from 8 bits a float."""
    return (dtype, *FLOAT_DTYPES) if is_bytes(dtype) else (dtype,)


def bias_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What a bias may be of: fp32, or the operands' own type where that is a float."""
    return (torch.float32,) if is_bytes(dtype) else (torch.float32, dtype)


def check_product(dtype: torch.dtype, depth: int, target: Target) -> None:
    """Refuses fp8 on a GPU without it, and int8 sums that could pass 32 bits.

    Args:
        depth: products in one sum.

    Raises:
        ValueError: saying which GPU has it, or how deep a sum may be.
    """
    if dtype == torch.int8 and depth > _DEEPEST:
        raise ValueError(f"{depth} int8 products in a sum, expected at most {_DEEPEST}: int32")
    if dtype == torch.float8_e4m3fn and target.sm < 89:
        raise ValueError(f"dtype is {dtype} on sm_{target.sm}, expected sm_89 or newer for fp8")


def by_steps(dtype: torch.dtype, depth: int, target: Target) -> bool:
    """Whether a kernel adds up each step's sum by itself: of fp8, as `summed_by_steps` says.

    Args:
        depth: products in one sum.
    """
    return dtype == torch.float8_e4m3fn and summed_by_steps(depth, target)


def check_factor(name: str, value: float) -> None:
    """Refuses a scale that no tensor has.

    Raises:
        ValueError: it is not positive, or no normal number of fp32.
    """
    if not (math.isfinite(value) and _LEAST <= value <= _MOST):
        raise ValueError(f"{name} is {value}, expected a positive number that is normal in fp32")


def factor(name: str, value: float) -> float | None:
    """A scale as an argument of a kernel; None, compiled out, where it is 1.

    Raises:
        ValueError: as `check_factor`.
    """
    check_factor(name, value)
    return None if value == 1.0 else float(value)


def epilogue_arguments(
    dtype: torch.dtype,
    x: torch.Tensor,
    k: int,
    scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_scale: float,
    out_scale: float,
) -> dict[str, Argument]:
    """The arguments `scale_ptr`, `residual_scale` and `out_scale` of a kernel, None where absent.

    Args:
        dtype: of the products' operands, which says whether there are scales.
        x: the tensor whose device they share.
        k: output channels.
        scale: [K] fp32, contiguous; goes with 8-bit operands.

    Raises:
        ValueError: scales that are missing, not wanted, or not positive.
    """
    if not is_bytes(dtype):
        given = scale is not None or residual_scale != 1.0 or out_scale != 1.0
        if given:
            raise ValueError(
                f"scale, residual_scale or out_scale is given for {dtype}; they are for 8-bit "
                f"operands, one of {BYTE_DTYPES}"
            )
        return {"scale_ptr": None, "residual_scale": None, "out_scale": None}
    if scale is None:
        raise ValueError(f"scale is missing, expected [{k}] fp32 for operands of {dtype}")
    check_like("scale", scale, (k,), x, [torch.float32])
    if residual is None and residual_scale != 1.0:
        raise ValueError(f"residual_scale is {residual_scale} with no residual")
    return {
        "scale_ptr": scale,
        "residual_scale": factor("residual_scale", residual_scale),
        "out_scale": factor("out_scale", out_scale),
    }
