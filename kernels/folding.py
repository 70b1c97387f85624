"""How a stem's picture is folded: 2x2 pixels are one, which a 4x4 filter of stride 1 reads.

Sizes, refusals and the filter, for planners; the kernels are in `space_to_depth.py` and `stem.py`.
"""

import math
from dataclasses import replace

import torch

from fastres.kernels.geometry import ConvShape, GemmShape, Pair

FOLDED = 16  # channels of a folded pixel: 2 x 2 pixels of up to 4 channels
MARGIN = (2, 1)  # folded pixels of zeros before and after: 4 taps reach from -2 to +1
TAPS = 4  # rows and columns of the folded filter
ROW = TAPS * FOLDED  # what a row of taps reads, in one piece


def fold_refusal(c: int, h: int, w: int) -> str | None:
    """Why a picture cannot be folded; None when it can."""
    if not 1 <= c <= 4:
        return f"the picture has {c} channels, expected 1 to 4: folded they must fit into {FOLDED}"
    if h < 2 or w < 2 or h % 2 or w % 2:
        return f"the picture has {h}x{w} pixels, expected even numbers, to fold 2x2 into one"
    if math.prod(packed_shape(1, h, w)) > 2**29 * FOLDED:  # a thin one's margin is most of it
        return f"the picture has {h}x{w} pixels, expected at most 2**29 folded, with the margin"
    return None


def packed_shape(n: int, h: int, w: int) -> tuple[int, int, int, int]:
    """Sizes of a folded picture with its margin: [N, H/2 + 3, W/2 + 3, 16]."""
    return n, h // 2 + sum(MARGIN), w // 2 + sum(MARGIN), FOLDED


def stem_refusal(c: int, h: int, w: int, taps: Pair, stride: Pair, padding: Pair) -> str | None:
    """Why a convolution is no stem of this kind; None when it is one.

    A planner then takes the convolution over pointers, which takes every one.
    """
    if (taps, stride, padding) != ((7, 7), (2, 2), (3, 3)):
        return (
            f"the filter is {taps}, stride {stride}, padding {padding}; expected 7x7, 2 and 3, "
            "whose taps fold into 4x4"
        )
    return fold_refusal(c, h, w)


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
    packed = weight.new_zeros(k, TAPS, TAPS, FOLDED)
    # k, c, (tap, dh), (tap, dw) -> k, tap, tap, (c, dh, dw)
    folded = eight.view(k, c, TAPS, 2, TAPS, 2).permute(0, 2, 4, 1, 3, 5)
    packed[..., : 4 * c] = folded.reshape(k, TAPS, TAPS, 4 * c)
    return packed.view(k, TAPS * ROW)


def stem_gemm(shape: ConvShape) -> GemmShape:
    """The product of a `stem_shape`, whose rows of folded pixels overlap in memory."""
    return replace(shape.gemm, x=shape.n * shape.h * (shape.w + TAPS - 1) * FOLDED)


def stem_shape(n: int, p: int, q: int, k: int) -> ConvShape:
    """The stem as a 4x1 convolution of rows of 4 folded pixels."""
    return ConvShape(n, p + TAPS - 1, q, ROW, k, TAPS, 1)
