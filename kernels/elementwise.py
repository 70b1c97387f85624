"""elementwise: y = act(x * scale + shift + r), for what cannot be a convolution's epilogue.

One kernel: a residual sum with its activation, a BatchNorm that could not be folded, the channel
weights of squeeze-and-excitation, with a residual or without, or an activation alone.
"""

import torch
import triton
import triton.language as tl

from fastres.kernels.cost import Cost
from fastres.kernels.dependent import await_predecessor
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.epilogue_jit import apply_activation
from fastres.kernels.launch import Launch, check_inner_stride, check_like, check_nhwc
from fastres.kernels.tiles import PoolTile, choose_pool_tile


@triton.jit
def _per_channel(ptr, n, c, ok, C: tl.constexpr, PER_IMAGE: tl.constexpr):
    """One fp32 value a channel, of this image or of all: [BLOCK_M or 1, BLOCK_C]."""
    if PER_IMAGE:
        v = tl.load(ptr + n[:, None] * C + c[None, :], mask=ok, other=0.0)
    else:
        v = tl.load(ptr + c, mask=c < C, other=0.0)[None, :]
    return v.to(tl.float32)


@triton.jit
def _elementwise_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    M,
    H,
    W,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_rn,
    stride_rh,
    stride_rw,
    C: tl.constexpr,
    SCALE_PER_IMAGE: tl.constexpr,
    SHIFT_PER_IMAGE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    await_predecessor(DEPENDENT)
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    rows = pid // TILES_C * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = (rows < M)[:, None] & (c < C)[None, :]
    # contiguous maps come as one row or one column of pixels, where W or H are compiled in as 1
    w = (rows % W).to(tl.int64)
    h = (rows // W % H).to(tl.int64)
    n = (rows // W // H).to(tl.int64)

    x_rows = x_ptr + n * stride_xn + h * stride_xh + w * stride_xw
    v = tl.load(x_rows[:, None] + c[None, :], mask=ok, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        v *= _per_channel(scale_ptr, n, c, ok, C, SCALE_PER_IMAGE)
    if shift_ptr is not None:
        v += _per_channel(shift_ptr, n, c, ok, C, SHIFT_PER_IMAGE)
    if residual_ptr is not None:
        r_rows = residual_ptr + n * stride_rn + h * stride_rh + w * stride_rw
        v += tl.load(r_rows[:, None] + c[None, :], mask=ok, other=0.0).to(tl.float32)
    v = apply_activation(v, ACTIVATION)
    y_tile = y_ptr + rows.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(y_tile, v.to(y_ptr.dtype.element_ty), mask=ok)


def elementwise_cost(elements: int, itemsize: int, operations: int, residual: bool) -> Cost:
    """FLOPs and compulsory bytes of one call; scale and shift are left out.

    Args:
        operations: on each element.
        itemsize: bytes of an element of x, residual and y.
    """
    return Cost(operations * elements, itemsize * elements * (3 if residual else 2))


def elementwise(
    x: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: ActivationKind | None = None,
    out: torch.Tensor | None = None,
    tile: PoolTile | None = None,
) -> torch.Tensor:
    """y = act(x * scale + shift + residual) in fp32, rounded once; absent parts are left out.

    A BatchNorm has scale = weight / sqrt(var + eps) and shift = bias - mean * scale.

    Args:
        x: [N, H, W, C] or [N, C], fp16, bf16 or fp32; channels packed, other strides free.
        scale, shift: [C], or [N, C] for values of each image; fp32 or of x's dtype, contiguous.
        residual: of x's shape and dtype; channels packed, other strides free.
        activation: applied last.
        out: of x's shape and dtype, contiguous; x itself where that is contiguous; allocated when
            None.
        tile: how to cut the work; chosen from the shape when None.

    Returns:
        y, of x's shape and dtype.

    Raises:
        ValueError: operands that do not fit together.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch = elementwise_launch(
        x, out, scale=scale, shift=shift, residual=residual, activation=activation, tile=tile
    )
    if out.numel() > 0:
        launch.run()
    return out


def add_act(
    a: torch.Tensor,
    b: torch.Tensor,
    activation: ActivationKind | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = act(a + b), see `elementwise`."""
    return elementwise(a, residual=b, activation=activation, out=out)


def elementwise_launch(
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: ActivationKind | None = None,
    tile: PoolTile | None = None,
) -> Launch:
    """The call `elementwise` makes, not yet made; tensors may be on the meta device.

    Raises:
        ValueError: operands that do not fit together.
    """
    if x.ndim not in (2, 4):
        raise ValueError(f"x has shape {list(x.shape)}, expected [N, H, W, C] or [N, C]")
    check_like("out", out, x.shape, x, [x.dtype])
    if residual is not None:
        check_like("residual", residual, x.shape, x, [x.dtype], contiguous=False)
        check_inner_stride("residual", residual)
    pictures = [_picture(v) for v in (x, residual) if v is not None]
    check_nhwc("x", pictures[0])
    n, h, w, c = pictures[0].shape
    if min(h, w, c) < 1:
        raise ValueError(f"x has shape {list(x.shape)}, only the batch may be zero")
    if n * h * w >= 2**31:
        raise ValueError(f"x has {n * h * w} pixels, expected under 2**31")
    for name, operand in (("scale", scale), ("shift", shift)):
        if operand is not None:
            sizes = (n, c) if operand.ndim == 2 else (c,)
            check_like(name, operand, sizes, x, [torch.float32, x.dtype])
    if all(picture.is_contiguous() for picture in pictures):
        per_image = any(v is not None and v.ndim == 2 for v in (scale, shift))
        pixels = (n, h * w, 1, c) if per_image else (n * h * w, 1, 1, c)
        pictures = [picture.view(pixels) for picture in pictures]
    if tile is None:
        tile = choose_pool_tile(c, x.element_size())
    x_strides = pictures[0].stride()
    r_strides = pictures[1].stride() if residual is not None else x_strides
    operations = sum(part is not None for part in (scale, shift, residual, activation))
    return Launch(
        kernel=_elementwise_kernel,
        programs=tile.programs(n * h * w, c),
        arguments={
            "x_ptr": x,
            "scale_ptr": scale,
            "shift_ptr": shift,
            "residual_ptr": residual,
            "y_ptr": out,
            "M": n * h * w,
            "H": pictures[0].shape[1],
            "W": pictures[0].shape[2],
            "stride_xn": x_strides[0],
            "stride_xh": x_strides[1],
            "stride_xw": x_strides[2],
            "stride_rn": r_strides[0],
            "stride_rh": r_strides[1],
            "stride_rw": r_strides[2],
        },
        constants={
            "C": c,
            "SCALE_PER_IMAGE": scale is not None and scale.ndim == 2,
            "SHIFT_PER_IMAGE": shift is not None and shift.ndim == 2,
            "ACTIVATION": activation,
            "BLOCK_M": tile.block_m,
            "BLOCK_C": tile.block_c,
            "DEPENDENT": False,
        },
        num_warps=tile.num_warps,
        num_stages=1,
        cost=elementwise_cost(x.numel(), x.element_size(), operations, residual is not None),
    )


def _picture(x: torch.Tensor) -> torch.Tensor:
    """A matrix as pictures of one pixel."""
    return x if x.ndim == 4 else x[:, None, None, :]
