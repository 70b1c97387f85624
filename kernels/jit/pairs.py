"""Tiles of 8 bits on their way to and from memory, two channels at a time.

Why, and in which order the rows of weights lie for it: `fastres.kernels.pairs`.
"""

import triton
import triton.language as tl

from fastres.kernels.jit.epilogue import INTERPRETED, round_to


@triton.jit
def in_order(acc, DTYPE: tl.constexpr):
    """A sum [N, M] with its channels in order, where weights of 8 bits are interleaved.

    No register moves: the two channels of a pair stay with the thread that has them.

    Args:
        DTYPE: of the weights.
    """
    if DTYPE.primitive_bitwidth == 8:
        rows = acc.reshape(acc.shape[0] // 16, 2, 8, acc.shape[1])
        acc = rows.permute(0, 2, 1, 3).reshape(acc.shape[0], acc.shape[1])
    return acc


@triton.jit
def load_box(box, n, p, q, k, DTYPE: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """A box of M pixels and N channels as [M, N].

    Args:
        box: the descriptor, of pairs where it is of int16.
        n, p, q, k: its first image, row, column and channel.
        DTYPE: what pairs are of.
    """
    if box.dtype == tl.int16:
        return _out_of_pairs(box.load([n, p, q, k // 2]).reshape(M, N // 2), DTYPE)
    else:
        return box.load([n, p, q, k]).reshape(M, N)


@triton.jit
def store_box(box, n, p, q, k, v, DTYPE: tl.constexpr, ROUND_TF32: tl.constexpr = False):
    """Stores v, fp32 [M, N], as a box of M pixels and N channels, and returns it as it is stored.

    Args:
        box, n, p, q, k, DTYPE: as `load_box` has them.
        ROUND_TF32: as `round_to` has it.
    """
    if box.dtype == tl.int16:
        pairs = _pairs_of(v, DTYPE)
        box.store([n, p, q, k // 2], pairs.reshape(box.block_shape))
        return _out_of_pairs(pairs, DTYPE)
    else:
        stored = round_to(v, box.dtype, ROUND_TF32)
        box.store([n, p, q, k], stored.reshape(box.block_shape))
        return stored


@triton.jit
def _pairs_of(v, DTYPE: tl.constexpr):
    """`round_to` of fp32 [M, N], and two channels in one int16 of [M, N / 2]."""
    first, second = tl.split(v.reshape(v.shape[0], v.shape[1] // 2, 2))
    if INTERPRETED:
        low = round_to(first, DTYPE).to(tl.uint8, bitcast=True).to(tl.int16)
        high = round_to(second, DTYPE).to(tl.uint8, bitcast=True).to(tl.int16)
        return low | (high << 8)
    elif DTYPE == tl.int8:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c, d;
            cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $3;
            cvt.rni.s32.f32 c, $2; cvt.rni.s32.f32 d, $4;
            cvt.pack.sat.s8.s32.b32 c, d, c, 0;
            cvt.pack.sat.s8.s32.b32 $0, b, a, c; }""",
            "=r,r,r,r,r",
            [first, second],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b16 a, b;
            cvt.rn.satfinite.e4m3x2.f32 a, $3, $1;
            cvt.rn.satfinite.e4m3x2.f32 b, $4, $2;
            mov.b32 $0, {a, b}; }""",
            "=r,r,r,r,r",
            [first, second],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )


@triton.jit
def _out_of_pairs(pairs, DTYPE: tl.constexpr):
    """[M, N] of DTYPE from int16 [M, N / 2]."""
    low = pairs.to(tl.int8).to(DTYPE, bitcast=True)
    high = (pairs >> 8).to(tl.int8).to(DTYPE, bitcast=True)
    return tl.join(low, high).reshape(pairs.shape[0], 2 * pairs.shape[1])
