"""The classifier head: global average pool, then y = act(x @ w.T + b), fp32 accumulate.

The linear layer is a 1x1 convolution of a 1x1 picture, so it runs on the convolution's kernel.
"""

import torch
import triton
import triton.language as tl

from fastres.kernels.conv2d import conv2d
from fastres.kernels.cost import Cost
from fastres.kernels.dependent import await_predecessor
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.launch import Launch, check_like, check_nhwc
from fastres.kernels.tiles import ConvTile, PoolTile, choose_mean_tile


@triton.jit
def _global_avg_pool_kernel(
    x_ptr,
    y_ptr,
    stride_xn,
    stride_xh,
    stride_xw,
    PIXELS: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    await_predecessor(DEPENDENT)
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    n = pid // TILES_C
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    x_image = x_ptr + n.to(tl.int64) * stride_xn + c
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, PIXELS, BLOCK_M):
        pixel = start + tl.arange(0, BLOCK_M)
        offset = (pixel // W).to(tl.int64) * stride_xh + (pixel % W).to(tl.int64) * stride_xw
        ok = (pixel < PIXELS)[:, None] & (c < C)[None, :]
        total += tl.load(x_image[None, :] + offset[:, None], mask=ok, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / PIXELS
    tl.store(y_ptr + n.to(tl.int64) * C + c, mean.to(y_ptr.dtype.element_ty), mask=c < C)


def global_avg_pool_cost(n: int, h: int, w: int, c: int, itemsize: int) -> Cost:
    """Additions and compulsory bytes of one call."""
    return Cost(n * h * w * c, itemsize * n * c * (h * w + 1))


def global_avg_pool(
    x: torch.Tensor, *, out: torch.Tensor | None = None, tile: PoolTile | None = None
) -> torch.Tensor:
    """y[n, c] = mean_hw x[n, h, w, c], summed in fp32.

    Args:
        x: [N, H, W, C] fp16, bf16 or fp32; channels packed, other strides free.
        out: [N, C] of x's dtype, contiguous; allocated when None.
        tile: how to cut the work; chosen from the shape when None.

    Returns:
        [N, C] of x's dtype.

    Raises:
        ValueError: operands that do not fit together.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    check_nhwc("x", x)
    if out is None:
        out = torch.empty((x.shape[0], x.shape[3]), dtype=x.dtype, device=x.device)
    launch = global_avg_pool_launch(x, out, tile=tile)
    if out.numel() > 0:
        launch.run()
    return out


def global_avg_pool_launch(
    x: torch.Tensor, out: torch.Tensor, *, tile: PoolTile | None = None
) -> Launch:
    """The call `global_avg_pool` makes, not yet made; tensors may be on the meta device.

    Raises:
        ValueError: operands that do not fit together.
    """
    check_nhwc("x", x)
    n, h, w, c = x.shape
    if min(h, w, c) < 1:
        raise ValueError(f"x has shape {list(x.shape)}: no pixels or no channels to average")
    check_like("out", out, (n, c), x, [x.dtype])
    if tile is None:
        tile = choose_mean_tile(h * w, c, x.element_size())
    return Launch(
        kernel=_global_avg_pool_kernel,
        programs=n * tile.programs(1, c),
        arguments={
            "x_ptr": x,
            "y_ptr": out,
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
            "DEPENDENT": False,
        },
        num_warps=tile.num_warps,
        num_stages=2,
        cost=global_avg_pool_cost(n, h, w, c, x.element_size()),
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
    out: torch.Tensor | None = None,
    tile: ConvTile | None = None,
    allow_tf32: bool = False,
) -> torch.Tensor:
    """y = act(x @ weight.T + bias), accumulated in fp32.

    Args:
        x: [N, C] fp16, bf16 or fp32; channels packed, rows may be strided.
        weight: [K, C] of x's dtype, contiguous.
        bias: [K] fp32 or of x's dtype, contiguous.
        out: [N, K] of x's dtype, contiguous; allocated when None.
        tile: how to cut the work; chosen from shape and device when None.
        allow_tf32: for fp32 inputs, tensor cores at reduced precision.

    Returns:
        [N, K] of x's dtype.

    Raises:
        ValueError: operands that do not fit together.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    if x.ndim != 2:
        raise ValueError(f"x has shape {list(x.shape)}, expected [N, C]")
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [K, C]")
    if out is not None:
        check_like("out", out, (x.shape[0], weight.shape[0]), x, [x.dtype])
    y = conv2d(
        x[:, None, None, :],
        weight[:, None, None, :],
        bias,
        activation=activation,
        out=None if out is None else out[:, None, None, :],
        tile=tile,
        allow_tf32=allow_tf32,
    )
    return y[:, 0, 0, :] if out is None else out
