"""elementwise: y = act(x * scale + shift + r), for what cannot be a convolution's epilogue.

One kernel: a residual sum with its activation, a BatchNorm that could not be folded, the channel
weights of squeeze-and-excitation, with a residual or without, or an activation alone. Operands
and result may be of 8 bits, each with a scale of its own; so it also quantises and turns back.
"""

import torch
import triton
import triton.language as tl

from fastres.kernels.cost import Cost
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.jit.dependent import await_predecessor
from fastres.kernels.jit.epilogue import apply_activation, round_to
from fastres.kernels.launch import Launch, check_inner_stride, check_like, check_nhwc
from fastres.kernels.quantised import ANY_DTYPES, bias_dtypes, factor, is_bytes
from fastres.kernels.tiles.pool import PoolTile, choose_pool_tile


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
    x_scale,
    residual_scale,
    out_scale,
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
    ROUND_TF32: tl.constexpr,
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
    if x_scale is not None:
        v *= x_scale
    if scale_ptr is not None:
        v *= _per_channel(scale_ptr, n, c, ok, C, SCALE_PER_IMAGE)
    if shift_ptr is not None:
        v += _per_channel(shift_ptr, n, c, ok, C, SHIFT_PER_IMAGE)
    if residual_ptr is not None:
        r_rows = residual_ptr + n * stride_rn + h * stride_rh + w * stride_rw
        r = tl.load(r_rows[:, None] + c[None, :], mask=ok, other=0.0).to(tl.float32)
        if residual_scale is not None:
            r *= residual_scale
        v += r
    v = apply_activation(v, ACTIVATION)
    if out_scale is not None:
        v *= out_scale
    y_tile = y_ptr + rows.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(y_tile, round_to(v, y_ptr.dtype.element_ty, ROUND_TF32), mask=ok)


def elementwise_cost(
    elements: int,
    itemsize: int,
    operations: int,
    residual: bool,
    out_itemsize: int | None = None,
) -> Cost:
    """FLOPs and compulsory bytes of one call; scale and shift are left out.

    Args:
        operations: on each element.
        itemsize: bytes of an element of x and residual.
        out_itemsize: of y; as x when None.
    """
    read = itemsize * (2 if residual else 1)
    return Cost(operations * elements, elements * (read + (out_itemsize or itemsize)))


def elementwise(
    x: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: ActivationKind | None = None,
    x_scale: float = 1.0,
    residual_scale: float = 1.0,
    out_scale: float = 1.0,
    out: torch.Tensor | None = None,
    tile: PoolTile | None = None,
) -> torch.Tensor:
    """y = act(x * scale + shift + residual) in fp32, rounded once; absent parts are left out.

    A BatchNorm has scale = weight / sqrt(var + eps) and shift = bias - mean * scale. Where x, the
    residual or y is of 8 bits, y = act(x * x_scale * scale + shift + residual * residual_scale) *
    out_scale, from left to right, each step one fp32 operation.

    Args:
        x: [N, H, W, C] or [N, C], fp16, bf16, fp32, int8 or fp8 e4m3; channels packed, other
            strides free.
        scale, shift: [C], or [N, C] for values of each image; fp32 or of x's dtype, contiguous.
        residual: of x's shape and dtype, or where 8 bits are about of any; channels packed, other
            strides free.
        activation: applied last, but for out_scale.
        x_scale, residual_scale: of operands, where 8 bits are about.
        out_scale: 1 / the scale of an 8-bit y.
        out: of x's shape and dtype, or where 8 bits are about of any, contiguous; x itself where
            that is contiguous; allocated when None.
        tile: how to cut the work; chosen from the shape when None.

    Returns:
        y, of x's shape, and of x's dtype unless out is given.

    Raises:
        ValueError: operands that do not fit together.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch = elementwise_launch(
        x,
        out,
        scale=scale,
        shift=shift,
        residual=residual,
        activation=activation,
        x_scale=x_scale,
        residual_scale=residual_scale,
        out_scale=out_scale,
        tile=tile,
    )
    if out.numel() > 0:
        launch.run()
    return out


def add_act(
    a: torch.Tensor,
    b: torch.Tensor,
    activation: ActivationKind | None = None,
    *,
    a_scale: float = 1.0,
    b_scale: float = 1.0,
    out_scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = act(a * a_scale + b * b_scale) * out_scale, see `elementwise`."""
    return elementwise(
        a,
        residual=b,
        activation=activation,
        x_scale=a_scale,
        residual_scale=b_scale,
        out_scale=out_scale,
        out=out,
    )


def elementwise_launch(
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: ActivationKind | None = None,
    x_scale: float = 1.0,
    residual_scale: float = 1.0,
    out_scale: float = 1.0,
    tile: PoolTile | None = None,
) -> Launch:
    """The call `elementwise` makes, not yet made; tensors may be on the meta device.

    Raises:
        ValueError: operands that do not fit together.
    """
    if x.ndim not in (2, 4):
        raise ValueError(f"x has shape {list(x.shape)}, expected [N, H, W, C] or [N, C]")
    operands = [v for v in (x, residual, out) if v is not None]
    quantised = any(is_bytes(v.dtype) for v in operands)
    dtypes = ANY_DTYPES if quantised else (x.dtype,)
    check_like("out", out, x.shape, x, dtypes)
    if not quantised and (x_scale, residual_scale, out_scale) != (1.0, 1.0, 1.0):
        raise ValueError(
            f"x_scale is {x_scale}, residual_scale {residual_scale} and out_scale {out_scale} with "
            "no tensor of 8 bits, expected 1"
        )
    if residual is None and residual_scale != 1.0:
        raise ValueError(f"residual_scale is {residual_scale} with no residual")
    if residual is not None:
        check_like("residual", residual, x.shape, x, dtypes, contiguous=False)
        check_inner_stride("residual", residual)
    pictures = [_picture(v) for v in (x, residual) if v is not None]
    check_nhwc("x", pictures[0], ANY_DTYPES)
    n, h, w, c = pictures[0].shape
    if min(h, w, c) < 1:
        raise ValueError(f"x has shape {list(x.shape)}, only the batch may be zero")
    if n * h * w >= 2**31:
        raise ValueError(f"x has {n * h * w} pixels, expected under 2**31")
    for name, operand in (("scale", scale), ("shift", shift)):
        if operand is not None:
            sizes = (n, c) if operand.ndim == 2 else (c,)
            check_like(name, operand, sizes, x, bias_dtypes(x.dtype))
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
            "x_scale": factor("x_scale", x_scale),
            "residual_scale": factor("residual_scale", residual_scale),
            "out_scale": factor("out_scale", out_scale),
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
            "ROUND_TF32": False,
            "DEPENDENT": False,
        },
        num_warps=tile.num_warps,
        num_stages=1,
        fp_fusion=not quantised,
        cost=elementwise_cost(
            x.numel(), x.element_size(), operations, residual is not None, out.element_size()
        ),
    )


def _picture(x: torch.Tensor) -> torch.Tensor:
    """A matrix as pictures of one pixel."""
    return x if x.ndim == 4 else x[:, None, None, :]
