"""max_pool and avg_pool: y = largest value, or mean, of each window, NHWC."""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from fastres.kernels.cost import Cost
from fastres.kernels.geometry import Pair, PoolShape, max_pool_cost
from fastres.kernels.jit.dependent import await_predecessor
from fastres.kernels.jit.epilogue import lowest, nearest_tf32, round_to
from fastres.kernels.launch import Launch, check_like, check_nhwc
from fastres.kernels.quantised import ANY_DTYPES
from fastres.kernels.tiles.pool import PoolTile, choose_pool_tile


@triton.jit
def _max_pool_kernel(
    x_ptr,
    y_ptr,
    M,
    H,
    W,
    P,
    Q,
    stride_xn,
    stride_xh,
    stride_xw,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    await_predecessor(DEPENDENT)
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    rows = pid // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = (rows < M)[:, None] & (c < C)[None, :]
    q = rows % Q
    p = rows // Q % P
    n = rows // Q // P
    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    # of each window's first pixel, which may lie in the padding: then nothing is read there
    x_rows = x_ptr + n.to(tl.int64) * stride_xn
    x_rows += h0.to(tl.int64) * stride_xh + w0.to(tl.int64) * stride_xw
    x_tile = x_rows[:, None] + c[None, :]

    padding = lowest(x_ptr.dtype.element_ty)
    best = tl.full((BLOCK_M, BLOCK_C), padding, tl.float32)
    for r in tl.static_range(R):  # unrolled, so that a window's loads are in flight together
        for s in tl.static_range(S):
            h = h0 + r * DILATION_H
            w = w0 + s * DILATION_W
            inside = ok & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
            tap = r * DILATION_H * stride_xh.to(tl.int64) + s * DILATION_W * stride_xw.to(tl.int64)
            v = tl.load(x_tile + tap, mask=inside, other=padding)
            v = v.to(tl.float32)
            # v != v: a NaN wins, and then stays, since nothing compares greater than it
            best = tl.where((v > best) | (v != v), v, best)
    y_tile = y_ptr + rows.to(tl.int64)[:, None] * C + c[None, :]
    if ROUND_TF32:
        best = nearest_tf32(best)
    tl.store(y_tile, best.to(y_ptr.dtype.element_ty), mask=ok)


def max_pool(
    x: torch.Tensor,
    *,
    kernel: Pair,
    stride: Pair,
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    ceil_mode: bool = False,
    out: torch.Tensor | None = None,
    tile: PoolTile | None = None,
) -> torch.Tensor:
    """Maximum over each window.

    y[n, p, q, c] = max_rs x[n, p*u + r*d - h0, q*v + s*e - w0, c]

    with (u, v) the stride, (d, e) the dilation and (h0, w0) the padding; NaN wins, padding loses.

    Args:
        x: [N, H, W, C] fp16, bf16, fp32, int8 or fp8 e4m3; channels packed, other strides free.
        padding: at most half of the kernel, as in PyTorch.
        ceil_mode: whether a last window that overhangs the input counts.
        out: [N, P, Q, C] of x's dtype, contiguous; allocated when None.
        tile: how to cut the work; chosen from the shape when None.

    Returns:
        [N, P, Q, C] of x's dtype.

    Raises:
        ValueError: operands that do not fit together.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    check_nhwc("x", x, ANY_DTYPES)
    n, h, w, c = x.shape
    shape = PoolShape(n, h, w, c, kernel, stride, padding, dilation, ceil_mode)
    if out is None:
        out = torch.empty((n, shape.p, shape.q, c), dtype=x.dtype, device=x.device)
    launch = max_pool_launch(x, out, shape=shape, tile=tile)
    if out.numel() > 0:
        launch.run()
    return out


def max_pool_launch(
    x: torch.Tensor, out: torch.Tensor, *, shape: PoolShape, tile: PoolTile | None = None
) -> Launch:
    """The call `max_pool` makes, not yet made; tensors may be on the meta device.

    Raises:
        ValueError: operands that do not fit together.
    """
    check_nhwc("x", x, ANY_DTYPES)
    check_like("x", x, (shape.n, shape.h, shape.w, shape.c), x, [x.dtype], contiguous=False)
    check_like("out", out, (shape.n, shape.p, shape.q, shape.c), x, [x.dtype])
    pixels = shape.n * shape.p * shape.q
    if tile is None:
        tile = choose_pool_tile(shape.c, x.element_size())
    return Launch(
        kernel=_max_pool_kernel,
        programs=tile.programs(pixels, shape.c),
        arguments={
            "x_ptr": x,
            "y_ptr": out,
            "M": pixels,
            "H": shape.h,
            "W": shape.w,
            "P": shape.p,
            "Q": shape.q,
            "stride_xn": x.stride(0),
            "stride_xh": x.stride(1),
            "stride_xw": x.stride(2),
        },
        constants={
            "C": shape.c,
            "R": shape.kernel[0],
            "S": shape.kernel[1],
            "STRIDE_H": shape.stride[0],
            "STRIDE_W": shape.stride[1],
            "PAD_H": shape.padding[0],
            "PAD_W": shape.padding[1],
            "DILATION_H": shape.dilation[0],
            "DILATION_W": shape.dilation[1],
            "BLOCK_M": tile.block_m,
            "BLOCK_C": tile.block_c,
            "ROUND_TF32": False,
            "DEPENDENT": False,
        },
        num_warps=tile.num_warps,
        num_stages=1,
        cost=max_pool_cost(shape, x.element_size()),
    )


@triton.jit
def _avg_pool_kernel(
    x_ptr,
    y_ptr,
    M,
    H,
    W,
    P,
    Q,
    stride_xn,
    stride_xh,
    stride_xw,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    COUNT_PADDING: tl.constexpr,
    DIVISOR: tl.constexpr,  # 0 for the size of the window
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    await_predecessor(DEPENDENT)
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    rows = pid // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = (rows < M)[:, None] & (c < C)[None, :]
    q = rows % Q
    p = rows // Q % P
    n = rows // Q // P
    h0 = p * STRIDE_H - PAD_H
    w0 = q * STRIDE_W - PAD_W
    x_images = x_ptr + n.to(tl.int64) * stride_xn

    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for r in tl.static_range(R):  # unrolled, so that a window's loads are in flight together
        for s in tl.static_range(S):
            h = h0 + r
            w = w0 + s
            inside = ok & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
            x_rows = x_images + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
            v = tl.load(x_rows[:, None] + c[None, :], mask=inside, other=0.0)
            total += v.to(tl.float32)
    if DIVISOR != 0:
        mean = total / DIVISOR
    else:
        # a window may overhang by ceil_mode: what lies beyond the padding never counts
        if COUNT_PADDING:
            high = tl.minimum(h0 + R, H + PAD_H) - h0
            wide = tl.minimum(w0 + S, W + PAD_W) - w0
        else:
            high = tl.minimum(h0 + R, H) - tl.maximum(h0, 0)
            wide = tl.minimum(w0 + S, W) - tl.maximum(w0, 0)
        # a window of padding alone has the sum 0 and, without padding, the count 0
        mean = total / tl.maximum(high * wide, 1).to(tl.float32)[:, None]
    y_tile = y_ptr + rows.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(y_tile, round_to(mean, y_ptr.dtype.element_ty, ROUND_TF32), mask=ok)


def avg_pool_cost(shape: PoolShape, itemsize: int) -> Cost:
    """Additions and compulsory bytes of one call."""
    return max_pool_cost(shape, itemsize)


def avg_pool(
    x: torch.Tensor,
    *,
    kernel: Pair,
    stride: Pair,
    padding: Pair = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
    out: torch.Tensor | None = None,
    tile: PoolTile | None = None,
) -> torch.Tensor:
    """Mean over each window, summed in fp32.

    y[n, p, q, c] = sum_rs x[n, p*u + r - h0, q*v + s - w0, c] / divisor

    with (u, v) the stride, (h0, w0) the padding, zero outside x.

    Args:
        x: [N, H, W, C] fp16, bf16 or fp32; channels packed, other strides free.
        padding: at most half of the kernel, as in PyTorch.
        ceil_mode: whether a last window that overhangs the input counts.
        count_include_pad: whether the window's size counts its padding; never what lies beyond.
        divisor: takes the place of the window's size.
        out: [N, P, Q, C] of x's dtype, contiguous; allocated when None.
        tile: how to cut the work; chosen from the shape when None.

    Returns:
        [N, P, Q, C] of x's dtype.

    Raises:
        ValueError: operands that do not fit together.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    check_nhwc("x", x)
    n, h, w, c = x.shape
    shape = PoolShape(n, h, w, c, kernel, stride, padding, ceil_mode=ceil_mode)
    if out is None:
        out = torch.empty((n, shape.p, shape.q, c), dtype=x.dtype, device=x.device)
    launch = avg_pool_launch(
        x, out, shape=shape, count_include_pad=count_include_pad, divisor=divisor, tile=tile
    )
    if out.numel() > 0:
        launch.run()
    return out


def avg_pool_launch(
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    shape: PoolShape,
    count_include_pad: bool = True,
    divisor: int | None = None,
    tile: PoolTile | None = None,
) -> Launch:
    """The call `avg_pool` makes, not yet made; tensors may be on the meta device.

    Raises:
        ValueError: operands that do not fit together.
    """
    check_nhwc("x", x)
    if shape.dilation != (1, 1):
        raise ValueError(f"dilation is {shape.dilation}, expected (1, 1): a mean has none")
    if divisor == 0:
        raise ValueError("divisor is 0, expected another number, or None for the window's size")
    launch = max_pool_launch(x, out, shape=shape, tile=tile)
    constants = {
        name: value for name, value in launch.constants.items() if not name.startswith("DILATION")
    }
    return replace(
        launch,
        kernel=_avg_pool_kernel,
        constants={**constants, "COUNT_PADDING": count_include_pad, "DIVISOR": divisor or 0},
        cost=avg_pool_cost(shape, x.element_size()),
    )
