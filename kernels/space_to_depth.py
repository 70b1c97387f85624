"""space_to_depth: folds 2x2 pixels of a picture into one of 16 channels, with a margin of zeros.

What the stem (`stem.py`) reads; casts and normalises on the way, so that a caller's picture is read
once and written once.
"""

import torch
import triton
import triton.language as tl

from fastres.kernels.folding import FOLDED, MARGIN, fold_refusal, packed_shape
from fastres.kernels.jit.epilogue import round_to
from fastres.kernels.launch import Launch
from fastres.kernels.layout import (
    check_first_images,
    check_normalise,
    check_picture,
    layout_cost,
    normalised,
)
from fastres.kernels.quantised import factor, is_bytes
from fastres.kernels.tiles.pool import PoolTile


@triton.jit
def _space_to_depth_kernel(
    x_ptr,
    normalise_ptr,
    y_ptr,
    out_scale,
    PH,  # folded rows, margin included
    PW,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    C: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROUND_TF32: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles = tl.cdiv(PH * PW, BLOCK_M)
    n = (pid // tiles).to(tl.int64)
    pixel = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    h = pixel // PW - BEFORE
    w = pixel % PW - BEFORE
    # channel (c, dh, dw): two neighbours of a row lie side by side, so a load may take both
    j = tl.arange(0, BLOCK_C)
    c = j // 4
    dh = j // 2 % 2
    dw = j % 2

    pixel_ok = pixel < PH * PW
    inside = (h >= 0) & (h < PH - BEFORE - AFTER) & (w >= 0) & (w < PW - BEFORE - AFTER) & pixel_ok
    ok = inside[:, None] & (j < 4 * C)[None, :]
    x_pixels = (2 * h).to(tl.int64) * stride_xh + (2 * w).to(tl.int64) * stride_xw
    x_parts = c.to(tl.int64) * stride_xc + dh.to(tl.int64) * stride_xh + dw.to(tl.int64) * stride_xw
    v = tl.load(x_ptr + n * stride_xn + x_pixels[:, None] + x_parts[None, :], mask=ok, other=0)
    v = normalised(v, normalise_ptr, out_scale, c, c < C, C)
    v = tl.where(ok, v, 0.0)  # the padding is of the normalised picture
    y_pixels = y_ptr + (n * PH * PW + pixel) * BLOCK_C
    y = round_to(v, y_ptr.dtype.element_ty, ROUND_TF32)
    tl.store(y_pixels[:, None] + j[None, :], y, mask=pixel_ok[:, None])


def space_to_depth(
    x: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float16,
    normalise: torch.Tensor | None = None,
    out_scale: float = 1.0,
    out: torch.Tensor | None = None,
    tile: PoolTile | None = None,
) -> torch.Tensor:
    """Folds 2x2 pixels into one, in fp32 and rounded once, with a margin of zeros.

    y[n, i + 2, j + 2, 4c + 2a + b] = (x[n, c, 2i + a, 2j + b] * scale[c] + shift[c]) * out_scale

    and 0 elsewhere: in 2 rows and columns before, 1 after, and in channels from 4C on. To int8 each
    of the three steps is one fp32 operation; the result is rounded half to even and saturated.

    Args:
        x: [N, C, H, W] fp16, bf16, fp32, uint8, int8 or fp8 e4m3, any strides, C up to 4, H and W
            even: an NHWC picture is the view `picture.permute(0, 3, 1, 2)`.
        dtype: of y when it is allocated: fp16, bf16, fp32, int8 or fp8 e4m3.
        normalise: [2, C] fp32, contiguous: scale and shift (see `layout.normalisation`).
        out_scale: 1 / the scale of an 8-bit y.
        out: [N', H/2 + 3, W/2 + 3, 16], contiguous, with N' >= N: pictures from N on are left
            alone; allocated when None.
        tile: how to cut the work; 128 folded pixels of 16 channels a block when None.

    Returns:
        [N, H/2 + 3, W/2 + 3, 16], or out.

    Raises:
        ValueError: operands that do not fit together, or that `fold_refusal` refuses.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    check_picture("x", x)
    if out is None:
        n, _, h, w = x.shape
        out = torch.empty(packed_shape(n, h, w), dtype=dtype, device=x.device)
    launch = space_to_depth_launch(x, out, normalise=normalise, out_scale=out_scale, tile=tile)
    if x.numel() > 0:
        launch.run()
    return out


def space_to_depth_launch(
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    normalise: torch.Tensor | None = None,
    out_scale: float = 1.0,
    tile: PoolTile | None = None,
) -> Launch:
    """The call `space_to_depth` makes, not yet made; tensors may be on the meta device.

    Raises:
        ValueError: operands that do not fit together, or that `fold_refusal` refuses.
    """
    check_picture("x", x)
    n, c, h, w = x.shape
    reason = fold_refusal(c, h, w)
    if reason is not None:
        raise ValueError(f"x cannot be folded: {reason}")
    sizes = packed_shape(n, h, w)
    check_first_images("out", out, sizes, x)
    check_normalise(normalise, x)
    if tile is None:
        tile = PoolTile(128, FOLDED, num_warps=4)
    if tile.block_c != FOLDED:
        raise ValueError(f"tile has {tile.block_c} channels, expected {FOLDED}")
    elements = n * sizes[1] * sizes[2] * FOLDED
    return Launch(
        kernel=_space_to_depth_kernel,
        programs=n * tile.programs(sizes[1] * sizes[2], FOLDED),
        arguments={
            "x_ptr": x,
            "normalise_ptr": normalise,
            "y_ptr": out,
            "out_scale": factor("out_scale", out_scale),
            "PH": sizes[1],
            "PW": sizes[2],
            "stride_xn": x.stride(0),
            "stride_xc": x.stride(1),
            "stride_xh": x.stride(2),
            "stride_xw": x.stride(3),
        },
        constants={
            "C": c,
            "BEFORE": MARGIN[0],
            "AFTER": MARGIN[1],
            "BLOCK_M": tile.block_m,
            "BLOCK_C": FOLDED,
            "ROUND_TF32": False,
        },
        num_warps=tile.num_warps,
        num_stages=1,
        fp_fusion=not is_bytes(out.dtype),
        cost=layout_cost(x, elements, out.element_size(), normalise is not None),
    )
