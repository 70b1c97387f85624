"""The ImageNet stem, 7x7 stride 2 padding 3, as a dense 4x4 stride 1 product over folded pixels.

Space-to-depth folds 2x2 pixels of up to 4 channels into 16, so that a row of 4 filter taps is 64
contiguous elements: the convolution reads the overlapping view [N, H/2+3, W/2, 64] of the folded
picture with a 4x1 filter, 16 bytes at a time and without a test for the padding, which is stored.

Source: space-to-depth as in the MLPerf TPU ResNet; the overlapping view is this project's.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from fastres.kernels.conv2d import conv2d_launch
from fastres.kernels.cost import Cost, Target
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.geometry import ConvShape, Pair
from fastres.kernels.launch import FLOAT_DTYPES, Launch, check_like, target_of
from fastres.kernels.layout import (
    check_first_images,
    check_normalise,
    check_picture,
    layout_cost,
    normalised,
)
from fastres.kernels.tiles import ConvTile, PoolTile

FOLDED = 16  # channels of a folded pixel: 2 x 2 pixels of up to 4 channels
MARGIN = (2, 1)  # folded pixels of zeros before and after: 4 taps reach from -2 to +1
_TAPS = 4


def stem_refusal(c: int, h: int, w: int, taps: Pair, stride: Pair, padding: Pair) -> str | None:
    """Why a convolution is no stem of this kind; None when it is one.

    A planner then takes the convolution over pointers, which takes every one.
    """
    if (taps, stride, padding) != ((7, 7), (2, 2), (3, 3)):
        return (
            f"the filter is {taps}, stride {stride}, padding {padding}; expected 7x7, 2 and 3, "
            "whose taps fold into 4x4"
        )
    if not 1 <= c <= 4:
        return f"the picture has {c} channels, expected 1 to 4: folded they must fit into {FOLDED}"
    if h < 2 or w < 2 or h % 2 or w % 2:
        return f"the picture has {h}x{w} pixels, expected even numbers, to fold 2x2 into one"
    return None


def packed_shape(n: int, h: int, w: int) -> tuple[int, int, int, int]:
    """Sizes of a folded picture with its margin: [N, H/2 + 3, W/2 + 3, 16]."""
    return n, h // 2 + sum(MARGIN), w // 2 + sum(MARGIN), FOLDED


def pack_stem_weight(weight: torch.Tensor) -> torch.Tensor:
    """Folds a stem's filter: [K, C, 7, 7], as PyTorch keeps it, to [K, 4*4*16].

    Tap r of 7 is row (r + 1) % 2 of folded tap (r + 1) // 2, since 2p - 3 + r = 2(p - 2) + r + 1;
    channels of a folded tap lie as `space_to_depth` lays them, those beyond 4C are zero.

    Raises:
        ValueError: no 7x7 filter of 1 to 4 channels.
    """
    if weight.ndim != 4 or tuple(weight.shape[2:]) != (7, 7) or not 1 <= weight.shape[1] <= 4:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [K, 1 to 4, 7, 7]")
    k, c = weight.shape[:2]
    eight = weight.new_zeros(k, c, 8, 8)
    eight[:, :, 1:, 1:] = weight
    packed = weight.new_zeros(k, _TAPS, _TAPS, FOLDED)
    # k, c, (tap, dh), (tap, dw) -> k, tap, tap, (c, dh, dw)
    folded = eight.view(k, c, _TAPS, 2, _TAPS, 2).permute(0, 2, 4, 1, 3, 5)
    packed[..., : 4 * c] = folded.reshape(k, _TAPS, _TAPS, 4 * c)
    return packed.view(k, _TAPS * _TAPS * FOLDED)


# ---------------------------------------------------------------- folding the picture


@triton.jit
def _space_to_depth_kernel(
    x_ptr,
    normalise_ptr,
    y_ptr,
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
    v = normalised(v, normalise_ptr, c, c < C, C)
    v = tl.where(ok, v, 0.0)  # the padding is of the normalised picture
    y_pixels = y_ptr + (n * PH * PW + pixel) * BLOCK_C
    tl.store(y_pixels[:, None] + j[None, :], v.to(y_ptr.dtype.element_ty), mask=pixel_ok[:, None])


def space_to_depth(
    x: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float16,
    normalise: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tile: PoolTile | None = None,
) -> torch.Tensor:
    """Folds 2x2 pixels into one, in fp32 and rounded once, with a margin of zeros.

    y[n, i + 2, j + 2, 4c + 2a + b] = x[n, c, 2i + a, 2j + b] * scale[c] + shift[c]

    and 0 elsewhere: in 2 rows and columns before, 1 after, and in channels from 4C on.

    Args:
        x: [N, C, H, W] fp16, bf16, fp32 or uint8, any strides, C up to 4, H and W even: an NHWC
            picture is the view `picture.permute(0, 3, 1, 2)`.
        dtype: of y when it is allocated: fp16, bf16 or fp32.
        normalise: [2, C] fp32, contiguous: scale and shift (see `layout.normalisation`).
        out: [N', H/2 + 3, W/2 + 3, 16], contiguous, with N' >= N: pictures from N on are left
            alone; allocated when None.
        tile: how to cut the work; 128 folded pixels of 16 channels a block when None.

    Returns:
        [N, H/2 + 3, W/2 + 3, 16], or out.

    Raises:
        ValueError: operands that do not fit together, or that `stem_refusal` refuses.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    check_picture("x", x)
    if out is None:
        n, _, h, w = x.shape
        out = torch.empty(packed_shape(n, h, w), dtype=dtype, device=x.device)
    launch = space_to_depth_launch(x, out, normalise=normalise, tile=tile)
    if x.numel() > 0:
        launch.run()
    return out


def space_to_depth_launch(
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    normalise: torch.Tensor | None = None,
    tile: PoolTile | None = None,
) -> Launch:
    """The call `space_to_depth` makes, not yet made; tensors may be on the meta device.

    Raises:
        ValueError: operands that do not fit together, or that `stem_refusal` refuses.
    """
    check_picture("x", x)
    n, c, h, w = x.shape
    reason = stem_refusal(c, h, w, (7, 7), (2, 2), (3, 3))
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
        },
        num_warps=tile.num_warps,
        num_stages=1,
        cost=layout_cost(x, elements, out.element_size(), normalise is not None),
    )


# ---------------------------------------------------------------- the product


def stem_cost(n: int, p: int, q: int, k: int, itemsize: int) -> Cost:
    """FLOPs, those with the zeros of the folding included, and compulsory bytes of one call."""
    depth = _TAPS * _TAPS * FOLDED
    x = n * (p + _TAPS - 1) * (q + _TAPS - 1) * FOLDED
    return Cost(2 * n * p * q * k * depth, itemsize * (x + k * depth + n * p * q * k))


def stem(
    packed: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: ActivationKind | None = "relu",
    boxes: bool = False,
    out: torch.Tensor | None = None,
    tile: ConvTile | None = None,
    allow_tf32: bool = False,
) -> torch.Tensor:
    """A 7x7 stride 2 padding 3 convolution of a folded picture, with bias and activation.

    y[n, p, q, k] = act(sum_rsc packed[n, p + r, q + s, c] * weight[k, 64r + 16s + c] + bias[k])

    The folded filter has an eighth row and column of zeros, and zero times NaN is NaN: a pixel that
    is no number reaches one more row and column of outputs than through 7x7 taps.

    Args:
        packed: [N, P + 3, Q + 3, 16] fp16, bf16 or fp32, contiguous, from `space_to_depth`.
        weight: [K, 256] of that dtype, contiguous, from `pack_stem_weight`.
        bias: [K] fp32 or of that dtype, contiguous.
        boxes: loads through a descriptor whose pixels overlap; see `stem_launch`.
        out: [N, P, Q, K] of that dtype, contiguous; allocated when None.
        tile: how to cut the work; chosen from shape and device when None, and for boxes.
        allow_tf32: for fp32, tensor cores at reduced precision.

    Returns:
        [N, P, Q, K] of packed's dtype.

    Raises:
        ValueError: operands that do not fit together.
        RuntimeError: CPU tensors while Triton's interpreter is off.
    """
    if out is None:
        n, p, q = _output_pixels(packed)
        out = torch.empty((n, p, q, len(weight)), dtype=packed.dtype, device=packed.device)
    launch = stem_launch(
        packed,
        weight,
        bias,
        out,
        activation=activation,
        boxes=boxes,
        tile=tile,
        allow_tf32=allow_tf32,
        target=target_of(packed.device),
    )
    if out.numel() > 0:
        launch.run()
    return out


def stem_launch(
    packed: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    target: Target,
    activation: ActivationKind | None = "relu",
    boxes: bool = False,
    tile: ConvTile | None = None,
    allow_tf32: bool = False,
) -> Launch:
    """The call `stem` makes, not yet made; tensors may be on the meta device.

    Args:
        target: the GPU it is meant for.
        boxes: through the copy engine, for sm_90 and newer. Pixels of the view are 32 bytes apart
            and 128 bytes long. No driver has been asked yet whether it encodes such a tensor map,
            so this is off unless asked for.

    Raises:
        ValueError: operands that do not fit together.
    """
    n, p, q = _output_pixels(packed)
    depth = _TAPS * _TAPS * FOLDED
    check_like("weight", weight, (weight.shape[0], depth), packed, [packed.dtype])
    k, row = len(weight), _TAPS * FOLDED
    shape = ConvShape(n, p + _TAPS - 1, q, row, k, _TAPS, 1)
    sn, sh, sw, _ = packed.stride()
    view = packed.as_strided((n, p + _TAPS - 1, q, row), (sn, sh, sw, 1))
    launch = conv2d_launch(
        view,
        weight.view(k, _TAPS, 1, row),
        bias,
        None,
        out,
        shape=shape,
        activation=activation,
        tile=tile,
        allow_tf32=allow_tf32,
        target=target,
    )
    return replace(launch, cost=stem_cost(n, p, q, k, packed.element_size()))


def _output_pixels(packed: torch.Tensor) -> tuple[int, int, int]:
    """N, P and Q of a folded picture."""
    least = _TAPS
    if packed.ndim != 4 or packed.shape[3] != FOLDED or min(packed.shape[1:3]) < least:
        raise ValueError(
            f"packed has shape {list(packed.shape)}, expected [N, P + 3, Q + 3, {FOLDED}]"
        )
    check_like("packed", packed, packed.shape, packed, FLOAT_DTYPES)
    n, h, w, _ = packed.shape
    return n, h - _TAPS + 1, w - _TAPS + 1
