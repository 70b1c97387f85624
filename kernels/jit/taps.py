"""The jit form of a filter's taps, told from stored zeros that are none.

Two forms of a convolution multiply such zeros: a folded stem's eighth row and column, and those of
merged groups for each other's channels. Zero times NaN or infinity is NaN, where PyTorch has a
number; so a block in which a sum is NaN takes such sums once more, over the taps alone.
"""

import triton
import triton.language as tl

from fastres.kernels.folding import FOLDED, ROW, TAPS

_FOLDED = tl.constexpr(FOLDED)
_ROW = tl.constexpr(ROW)
_TAPS = tl.constexpr(TAPS)


@triton.jit
def without_zeros(
    acc,
    x_rows,
    weight_ptr,
    first,
    row_ok,
    h0,
    w0,
    H,
    W,
    stride_h,
    stride_w,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PADDED: tl.constexpr,
    MERGED: tl.constexpr,
    FOLDED: tl.constexpr,
):
    """acc, with those of its sums that are NaN taken over the taps alone.

    Slow, and in few registers: one output channel after the other, one product at a time. Where no
    sum is NaN, a test of the block is all that it costs; all other sums keep every bit.

    Args:
        acc: [BLOCK_M, BLOCK_N] fp32.
        x_rows: [BLOCK_M] pointers to the pixels under each output's first tap.
        weight_ptr: the filters [K, R*S*C] of a group.
        first: output channel of the first column.
        row_ok: [BLOCK_M], which rows are outputs.
        h0, w0: [BLOCK_M], row and column of those pixels, where the picture is PADDED.
        MERGED: groups that share the product, with zeros for each other's channels.
        FOLDED: whether the filter is a folded stem's.
    """
    if tl.max((acc != acc).to(tl.int32)) > 0:
        PART: tl.constexpr = C // MERGED
        cols = first + tl.arange(0, acc.shape[1])
        # Registers that this takes, the whole kernel has to have; so the compiler must not know
        # the depth, or it unrolls that loop whole.
        depth = R * S * PART + tl.minimum(H, 0)
        for col in range(first, tl.minimum(first + acc.shape[1], K)):
            part = col // (K // MERGED) * PART
            x_part = x_rows + part
            weight_part = weight_ptr + tl.cast(col, tl.int64) * (R * S * C) + part
            total = tl.zeros((acc.shape[0],), tl.float32)
            for i in range(depth):
                k = tl.cast(i, tl.int32)  # the interpreter counts in Python's numbers
                tap = k // PART
                h = tap // S * DILATION_H
                w = tap % S * DILATION_W
                inside = row_ok
                if PADDED:
                    inside &= (h0 + h >= 0) & (h0 + h < H) & (w0 + w >= 0) & (w0 + w < W)
                offset = h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
                if FOLDED:  # of a block: one truth value is a number to the interpreter
                    inside &= _is_tap(k + tl.zeros(inside.shape, tl.int32))
                a = tl.load(x_part + offset + k % PART, mask=inside, other=0.0)
                b = tl.load(weight_part + tap * C + k % PART)
                total += a.to(tl.float32) * b.to(tl.float32)
            acc = tl.where((acc != acc) & (cols == col)[None, :], total[:, None], acc)
    return acc


@triton.jit
def _is_tap(k):
    """Whether weight k of a folded filter is of the 7x7: in no first row or column of 8x8."""
    row = k // _ROW * 2 + k // 2 % 2
    column = k // _FOLDED % _TAPS * 2 + k % 2
    return (row > 0) & (column > 0)
