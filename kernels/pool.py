"""max_pool: y = largest value in each window, NHWC."""

import torch
import triton
import triton.language as tl

from fastres.kernels.cost import Cost
from fastres.kernels.geometry import Pair, PoolShape
from fastres.kernels.launch import Launch, check_like, check_nhwc
from fastres.kernels.tiles import PoolTile, choose_pool_tile


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
):
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

    best = tl.full((BLOCK_M, BLOCK_C), float("-inf"), tl.float32)
    for r in tl.static_range(R):  # unrolled, so that a window's loads are in flight together
        for s in tl.static_range(S):
            h = h0 + r * DILATION_H
            w = w0 + s * DILATION_W
            inside = ok & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
            x_rows = x_images + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
            v = tl.load(x_rows[:, None] + c[None, :], mask=inside, other=float("-inf"))
            v = v.to(tl.float32)
            # v != v: a NaN wins, and then stays, since nothing compares greater than it
            best = tl.where((v > best) | (v != v), v, best)
    y_tile = y_ptr + rows.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(y_tile, best.to(y_ptr.dtype.element_ty), mask=ok)


def max_pool_cost(shape: PoolShape, itemsize: int) -> Cost:
    """Comparisons, counted as FLOPs, and compulsory bytes of one call."""
    y = shape.n * shape.p * shape.q * shape.c
    x = shape.n * shape.h * shape.w * shape.c
    return Cost(y * shape.kernel[0] * shape.kernel[1], itemsize * (x + y))


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
        x: [N, H, W, C] fp16, bf16 or fp32; channels packed, other strides free.
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
    check_nhwc("x", x)
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
    check_nhwc("x", x)
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
        },
        num_warps=tile.num_warps,
        num_stages=1,
        cost=max_pool_cost(shape, x.element_size()),
    )
