"""The classifier head: global average pool, then y = act(x @ w.T + b), fp32 accumulate.

The linear layer is a 1x1 convolution of a 1x1 picture, so it runs on the convolution's kernel.
"""

import torch
import triton
import triton.language as tl

from fastres.kernels.conv2d import conv2d
from fastres.kernels.cost import Cost
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.jit.dependent import await_predecessor
from fastres.kernels.jit.epilogue import round_to
from fastres.kernels.launch import Launch, check_like, check_nhwc
from fastres.kernels.quantised import ANY_DTYPES, check_factor, factor, is_bytes, result_dtypes
from fastres.kernels.tiles.conv import ConvTile
from fastres.kernels.tiles.pool import PoolTile, choose_mean_tile


@triton.jit
def _global_avg_pool_kernel(
    x_ptr,
    y_ptr,
    scale,
    out_scale,
    stride_xn,
    stride_xh,
    stride_xw,
    PIXELS: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    await_predecessor(DEPENDENT)
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    n = pid // TILES_C
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    x_image = x_ptr + n.to(tl.int64) * stride_xn + c
    SUM: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    total = tl.zeros((BLOCK_M, BLOCK_C), SUM)
    for start in range(0, PIXELS, BLOCK_M):
        pixel = start + tl.arange(0, BLOCK_M)
        offset = (pixel // W).to(tl.int64) * stride_xh + (pixel % W).to(tl.int64) * stride_xw
        ok = (pixel < PIXELS)[:, None] & (c < C)[None, :]
        total += tl.load(x_image[None, :] + offset[:, None], mask=ok, other=0.0).to(SUM)
    if scale is None:
        mean = tl.sum(total, 0) / PIXELS
    else:
        mean = tl.sum(total, 0).to(tl.float32) * scale
    if out_scale is not None:
        mean *= out_scale
    mean = round_to(mean, y_ptr.dtype.element_ty, ROUND_TF32)
    tl.store(y_ptr + n.to(tl.int64) * C + c, mean, mask=c < C)


def global_avg_pool_cost(
    n: int, h: int, w: int, c: int, itemsize: int, out_itemsize: int | None = None
) -> Cost:
    """Additions and compulsory bytes of one call.

    Args:
        itemsize: bytes of an element of x.
        out_itemsize: of y; as x when None.
    """
    return Cost(n * h * w * c, n * c * (itemsize * h * w + (out_itemsize or itemsize)))


def global_avg_pool(
    x: torch.Tensor,
    *,
    scale: float = 1.0,
    out_scale: float = 1.0,
    out: torch.Tensor | None = None,
    tile: PoolTile | None = None,
) -> torch.Tensor:
    """y[n, c] = mean_hw x[n, h, w, c], summed in fp32.

    Of 8 bits y[n, c] = (sum_hw x[n, h, w, c]) * (scale / HW) * out_scale, int8 summed in int32.

    Args:
        x: [N, H, W, C] fp16, bf16, fp32, int8 or fp8 e4m3; channels packed, other strides free.
        scale: of an 8-bit x.
        out_scale: 1 / the scale of an 8-bit y.
        out: [N, C] of x's dtype, or a float for 8 bits, contiguous; allocated when None.
        tile: how to cut the work; chosen from the shape when None.

    Returns:
        [N, C], of x's dtype unless out is given.

    Raises:
        ValueError: operands that do not fit together.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    check_nhwc("x", x, ANY_DTYPES)
    if out is None:
        out = torch.empty((x.shape[0], x.shape[3]), dtype=x.dtype, device=x.device)
    launch = global_avg_pool_launch(x, out, scale=scale, out_scale=out_scale, tile=tile)
    if out.numel() > 0:
        launch.run()
    return out


def global_avg_pool_launch(
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float = 1.0,
    out_scale: float = 1.0,
    tile: PoolTile | None = None,
) -> Launch:
    """The call `global_avg_pool` makes, not yet made; tensors may be on the meta device.

    Raises:
        ValueError: operands that do not fit together.
    """
    check_nhwc("x", x, ANY_DTYPES)
    n, h, w, c = x.shape
    if min(h, w, c) < 1:
        raise ValueError(f"x has shape {list(x.shape)}: no pixels or no channels to average")
    check_like("out", out, (n, c), x, result_dtypes(x.dtype))
    quantised = is_bytes(x.dtype)
    if not quantised and (scale, out_scale) != (1.0, 1.0):
        raise ValueError(f"scale is {scale}, out_scale {out_scale}; {x.dtype} has none, expected 1")
    check_factor("scale", scale)
    check_factor("scale / pixels", scale / (h * w))
    if tile is None:
        tile = choose_mean_tile(h * w, c, x.element_size())
    return Launch(
        kernel=_global_avg_pool_kernel,
        programs=n * tile.programs(1, c),
        arguments={
            "x_ptr": x,
            "y_ptr": out,
            "scale": scale / (h * w) if quantised else None,
            "out_scale": factor("out_scale", out_scale),
            "stride_xn": x.stride(0),
            "stride_xh": x.stride(1),
            "stride_xw": x.stride(2),
        },
        constants={
            "PIXELS": h * w,
            "W": w,
            "C": c,
            "BLOCK_M": tile.block_m,
            "BLOCK_C": tile.block_c,
            "ROUND_TF32": False,
            "DEPENDENT": False,
        },
        num_warps=tile.num_warps,
        num_stages=2,
        fp_fusion=not quantised,
        cost=global_avg_pool_cost(n, h, w, c, x.element_size(), out.element_size()),
    )


def linear_cost(n: int, c: int, k: int, itemsize: int) -> Cost:
    """FLOPs and compulsory bytes of one call."""
    return Cost(2 * n * c * k, itemsize * (n * c + c * k + n * k))


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: ActivationKind | None = None,
    scale: torch.Tensor | None = None,
    out_scale: float = 1.0,
    out: torch.Tensor | None = None,
    tile: ConvTile | None = None,
    allow_tf32: bool = False,
) -> torch.Tensor:
    """y = act(x @ weight.T + bias), accumulated in fp32.

    Args:
        x: [N, C] fp16, bf16, fp32, int8 or fp8 e4m3; channels packed, rows may be strided.
        weight: [K, C] of x's dtype, contiguous.
        bias: [K] fp32 or of x's dtype, contiguous; fp32 for 8 bits.
        scale, out_scale: of 8 bits, as for `conv2d`.
        out: [N, K] of x's dtype, or a float for 8 bits, contiguous; allocated when None.
        tile: how to cut the work; chosen from shape and device when None.
        allow_tf32: for fp32, tensor cores, which cut off what `reference.round_tf32` rounds.

    Returns:
        [N, K], of x's dtype unless out is given.

    Raises:
        ValueError: operands that do not fit together.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    if x.ndim != 2:
        raise ValueError(f"x has shape {list(x.shape)}, expected [N, C]")
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [K, C]")
    if out is not None:
        check_like("out", out, (x.shape[0], weight.shape[0]), x, result_dtypes(x.dtype))
    y = conv2d(
        x[:, None, None, :],
        weight[:, None, None, :],
        bias,
        activation=activation,
        scale=scale,
        out_scale=out_scale,
        out=None if out is None else out[:, None, None, :],
        tile=tile,
        allow_tf32=allow_tf32,
    )
    return y[:, 0, 0, :] if out is None else out
