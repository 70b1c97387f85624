"""Copies between layouts and element types: y[n, pixel, c] = x[n, pixel, c], each side as it lies.

One kernel serves both ways: its loads run along the packed dimension of x and its stores along that
of y, and the compiler turns the tile between them in shared memory. It also normalises pictures,
quantises to 8 bits and turns 8 bits back.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastres.kernels.cost import Cost
from fastres.kernels.jit.epilogue import round_to
from fastres.kernels.launch import Launch, check_like
from fastres.kernels.quantised import ANY_DTYPES, factor, is_bytes
from fastres.kernels.tiles.pool import PoolTile

PICTURE_DTYPES = (*ANY_DTYPES, torch.uint8)


@triton.jit
def normalised(v, normalise_ptr, out_scale, c, c_ok, C: tl.constexpr):
    """(v * scale[c] + shift[c]) * out_scale in fp32; what is None is left out.

    Args:
        v: [BLOCK_M, BLOCK_C] of any type.
        normalise_ptr: [2, C] fp32, scale and shift, or None.
        out_scale: one number, or None.
    """
    v = v.to(tl.float32)
    if normalise_ptr is not None:
        scale = tl.load(normalise_ptr + c, mask=c_ok, other=0.0)
        shift = tl.load(normalise_ptr + C + c, mask=c_ok, other=0.0)
        v = v * scale[None, :] + shift[None, :]
    if out_scale is not None:
        v *= out_scale
    return v


@triton.jit
def _layout_kernel(
    x_ptr,
    normalise_ptr,
    y_ptr,
    out_scale,
    PIXELS,  # of one picture
    W,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_xc,
    stride_yn,
    stride_yw,  # y's rows follow each other
    stride_yc,
    C: tl.constexpr,
    Y_CHANNELS: tl.constexpr,  # at least C; zero from there on
    ROWS_APART: tl.constexpr,  # whether x's rows do not follow each other
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROUND_TF32: tl.constexpr,
):
    TILES_C: tl.constexpr = (Y_CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(PIXELS, BLOCK_M)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = pid // TILES_C % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid // TILES_C // tiles_m).to(tl.int64)

    if ROWS_APART:
        x_pixels = (pixel // W).to(tl.int64) * stride_xh + (pixel % W).to(tl.int64) * stride_xw
    else:
        x_pixels = pixel.to(tl.int64) * stride_xw
    x_tile = x_ptr + n * stride_xn + x_pixels[:, None] + c.to(tl.int64)[None, :] * stride_xc
    pixel_ok = (pixel < PIXELS)[:, None]
    v = tl.load(x_tile, mask=pixel_ok & (c < C)[None, :], other=0)
    v = normalised(v, normalise_ptr, out_scale, c, c < C, C)

    y_pixels = pixel.to(tl.int64) * stride_yw
    y_tile = y_ptr + n * stride_yn + y_pixels[:, None] + c.to(tl.int64)[None, :] * stride_yc
    y_ok = pixel_ok & (c < Y_CHANNELS)[None, :]
    tl.store(y_tile, round_to(v, y_ptr.dtype.element_ty, ROUND_TF32), mask=y_ok)


def normalisation(
    mean: Sequence[float], std: Sequence[float], device: torch.device | str | None = None
) -> torch.Tensor:
    """What turns bytes u into (u/255 - mean) / std: scale and shift of u, worked out in fp64.

    Args:
        mean, std: one value a channel, in units of the full range.

    Returns:
        [2, C] fp32: 1 / (255 std) and -mean / std.

    Raises:
        ValueError: values that do not pair up, or a std that is not positive.
    """
    if len(mean) != len(std) or not mean:
        raise ValueError(f"mean has {len(mean)} values and std {len(std)}, expected one a channel")
    if min(std) <= 0:
        raise ValueError(f"std is {list(std)}, expected positive values")
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return torch.tensor([[1 / (255 * s) for s in std], shift], dtype=torch.float32, device=device)


def layout_cost(x: torch.Tensor, y_elements: int, y_itemsize: int, normalise: bool = False) -> Cost:
    """FLOPs of the normalisation and compulsory bytes of one call."""
    flops = 2 * x.numel() if normalise else 0
    return Cost(flops, x.element_size() * x.numel() + y_itemsize * y_elements)


def to_nhwc(
    x: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    channels: int | None = None,
    normalise: torch.Tensor | None = None,
    out_scale: float = 1.0,
    out: torch.Tensor | None = None,
    tile: PoolTile | None = None,
) -> torch.Tensor:
    """y[n, h, w, c] = (x[n, c, h, w] * scale[c] + shift[c]) * out_scale, in fp32, rounded once.

    To int8 each of the three steps is one fp32 operation; the result is rounded half to even and
    saturated.

    Args:
        x: [N, C, H, W] fp16, bf16, fp32, uint8, int8 or fp8 e4m3, any strides: an NHWC picture is
            the view `picture.permute(0, 3, 1, 2)`.
        dtype: of y, fp16, bf16, fp32, int8 or fp8 e4m3; x's when None.
        channels: of y, at least C, zero from C on; C when None.
        normalise: [2, C] fp32, contiguous: scale and shift (see `normalisation`); 1 and 0 if None.
        out_scale: 1 / the scale of an 8-bit y.
        out: [N', H, W, channels], contiguous, with N' >= N: pictures from N on are left alone;
            allocated when None.
        tile: how to cut the work; chosen from the shape when None.

    Returns:
        [N, H, W, channels], or out.

    Raises:
        ValueError: operands that do not fit together.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    check_picture("x", x)
    if out is None:
        n, c, h, w = x.shape
        sizes = (n, h, w, c if channels is None else channels)
        out = torch.empty(sizes, dtype=dtype or x.dtype, device=x.device)
    elif channels not in (None, out.shape[-1]) or dtype not in (None, out.dtype):
        raise ValueError(
            f"out has shape {list(out.shape)} and dtype {out.dtype}, expected {channels} channels "
            f"and dtype {dtype}"
        )
    launch = to_nhwc_launch(x, out, normalise=normalise, out_scale=out_scale, tile=tile)
    if x.numel() > 0:
        launch.run()
    return out


def to_nhwc_launch(
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    normalise: torch.Tensor | None = None,
    out_scale: float = 1.0,
    tile: PoolTile | None = None,
) -> Launch:
    """The call `to_nhwc` makes, not yet made; tensors may be on the meta device.

    Raises:
        ValueError: operands that do not fit together.
    """
    check_picture("x", x)
    n, c, h, w = x.shape
    check_first_images("out", out, (n, h, w, None), x)
    if out.shape[3] < c:
        raise ValueError(f"out has {out.shape[3]} channels, expected at least x's {c}")
    check_normalise(normalise, x)
    return _layout_launch(x.permute(0, 2, 3, 1), out, normalise, out_scale, tile)


def to_nchw(
    x: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
    out: torch.Tensor | None = None,
    tile: PoolTile | None = None,
) -> torch.Tensor:
    """y[n, c, h, w] = x[n, h, w, c] * scale, cast to y's dtype.

    Args:
        x: [N, H, W, C] fp16, bf16, fp32, uint8, int8 or fp8 e4m3, any strides.
        dtype: of y, fp16, bf16, fp32, int8 or fp8 e4m3; x's when None.
        scale: of an 8-bit x; 1 / that of an 8-bit y.
        out: [N', C, H, W], contiguous, with N' >= N: pictures from N on are left alone; allocated
            when None.
        tile: how to cut the work; chosen from the shape when None.

    Returns:
        [N, C, H, W], or out.

    Raises:
        ValueError: operands that do not fit together.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    check_picture("x", x, "[N, H, W, C]")
    if out is None:
        n, h, w, c = x.shape
        out = torch.empty((n, c, h, w), dtype=dtype or x.dtype, device=x.device)
    elif dtype not in (None, out.dtype):
        raise ValueError(f"out has dtype {out.dtype}, expected {dtype}")
    launch = to_nchw_launch(x, out, scale=scale, tile=tile)
    if x.numel() > 0:
        launch.run()
    return out


def to_nchw_launch(
    x: torch.Tensor, out: torch.Tensor, *, scale: float = 1.0, tile: PoolTile | None = None
) -> Launch:
    """The call `to_nchw` makes, not yet made; tensors may be on the meta device.

    Raises:
        ValueError: operands that do not fit together.
    """
    check_picture("x", x, "[N, H, W, C]")
    n, h, w, c = x.shape
    check_first_images("out", out, (n, c, h, w), x)
    return _layout_launch(x, out.permute(0, 2, 3, 1), None, scale, tile, "scale")


def cast(
    x: torch.Tensor, *, dtype: torch.dtype, scale: float = 1.0, tile: PoolTile | None = None
) -> torch.Tensor:
    """A matrix in another element type: y = x * scale.

    Args:
        x: [M, C] fp16, bf16, fp32, uint8, int8 or fp8 e4m3, any strides.
        dtype: fp16, bf16, fp32, int8 or fp8 e4m3.
        scale: of an 8-bit x; 1 / that of an 8-bit y.

    Returns:
        [M, C], contiguous.

    Raises:
        ValueError: operands that do not fit together.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    if x.ndim != 2:
        raise ValueError(f"x has shape {list(x.shape)}, expected [M, C]")
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    launch = cast_launch(x, out, scale=scale, tile=tile)
    if x.numel() > 0:
        launch.run()
    return out


def cast_launch(
    x: torch.Tensor, out: torch.Tensor, *, scale: float = 1.0, tile: PoolTile | None = None
) -> Launch:
    """The call `cast` makes, not yet made: rows are the pixels of one picture.

    Raises:
        ValueError: operands that do not fit together.
    """
    if x.ndim != 2:
        raise ValueError(f"x has shape {list(x.shape)}, expected [M, C]")
    check_like("out", out, x.shape, x, ANY_DTYPES)
    picture = x[None, None]  # [1, 1, M, C]
    check_picture("x", picture)
    return _layout_launch(picture, out[None, None], None, scale, tile, "scale")


def check_picture(name: str, x: torch.Tensor, layout: str = "[N, C, H, W]") -> None:
    """Refuses what no kernel reads as pictures: wrong rank or dtype, no pixels.

    Raises:
        ValueError: naming the tensor, what was found and what was expected.
    """
    if x.ndim != 4:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected {layout}")
    if x.dtype not in PICTURE_DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}, expected one of {PICTURE_DTYPES}")
    if min(x.shape[1:]) < 1:
        raise ValueError(f"{name} has shape {list(x.shape)}, only the batch may be zero")


def check_first_images(
    name: str, out: torch.Tensor, sizes: Sequence[int | None], x: torch.Tensor
) -> None:
    """Refuses an output whose first images are not of these sizes; None takes any."""
    n = sizes[0] or 0
    expected = [f">= {n}", *("any" if size is None else str(size) for size in sizes[1:])]
    found = list(out.shape)
    fit = len(found) == len(sizes) and found[0] >= n
    fit = fit and all(b in (None, a) for a, b in zip(found[1:], sizes[1:], strict=True))
    if not fit:
        raise ValueError(f"{name} has shape {found}, expected [{', '.join(expected)}]")
    check_like(name, out, found, x, ANY_DTYPES)


def check_normalise(normalise: torch.Tensor | None, x: torch.Tensor) -> None:
    """Refuses scale and shift that do not go with x: [N, C, H, W]."""
    if normalise is not None:
        check_like("normalise", normalise, (2, x.shape[1]), x, [torch.float32])


def _layout_launch(
    x: torch.Tensor,
    y: torch.Tensor,
    normalise: torch.Tensor | None,
    out_scale: float,
    tile: PoolTile | None,
    name: str = "out_scale",
) -> Launch:
    """x [N, H, W, C] into the first images of y [N', H, W, C'], both any views in NHWC order."""
    n, h, w, c = x.shape
    channels = y.shape[3]
    if h * w > 2**31 - 2**12:  # blocks are rounded up in 32 bits
        raise ValueError(f"x has {h}x{w} pixels an image, expected at most 2**31 - 2**12")
    if tile is None:
        # 64 x 64 turns in 8 KB of shared memory; a picture's few channels take longer rows
        block_c = min(triton.next_power_of_2(channels), 64)
        block_m = min(triton.next_power_of_2(h * w), 4096 // block_c, 512)
        tile = PoolTile(block_m, block_c, num_warps=4)
    return Launch(
        kernel=_layout_kernel,
        programs=n * tile.programs(h * w, channels),
        arguments={
            "x_ptr": x,
            "normalise_ptr": normalise,
            "y_ptr": y,
            "out_scale": factor(name, out_scale),
            "PIXELS": h * w,
            "W": w,
            "stride_xn": x.stride(0),
            "stride_xh": x.stride(1),
            "stride_xw": x.stride(2),
            "stride_xc": x.stride(3),
            "stride_yn": y.stride(0),
            "stride_yw": y.stride(2),
            "stride_yc": y.stride(3),
        },
        constants={
            "C": c,
            "Y_CHANNELS": channels,
            "ROWS_APART": x.stride(1) != w * x.stride(2),
            "BLOCK_M": tile.block_m,
            "BLOCK_C": tile.block_c,
            "ROUND_TF32": False,
        },
        num_warps=tile.num_warps,
        num_stages=1,
        fp_fusion=not is_bytes(y.dtype),
        cost=layout_cost(x, n * h * w * channels, y.element_size(), normalise is not None),
    )
