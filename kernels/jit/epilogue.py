"""The jit form of `fastres.kernels.epilogue.Epilogue`: what happens to an accumulator."""

import triton
import triton.language as tl
from triton import knobs

from fastres.kernels.epilogue import TF32_LIMIT

_TF32_LIMIT = tl.constexpr(TF32_LIMIT)
INTERPRETED = tl.constexpr(knobs.runtime.interpret)  # which has no machine instructions


@triton.jit
def apply_activation(v, ACTIVATION: tl.constexpr):
    """act(v) on an fp32 tile; NaN stays NaN, as in PyTorch. ACTIVATION None returns v."""
    if ACTIVATION == "relu":
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        v = v / (1.0 + tl.exp(-v))
    elif ACTIVATION == "sigmoid":
        v = 1.0 / (1.0 + tl.exp(-v))
    elif ACTIVATION == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "hardswish":
        v = v * tl.minimum(tl.maximum(v + 3.0, 0.0), 6.0) / 6.0
    else:
        tl.static_assert(ACTIVATION is None, "unknown activation")
    return v


@triton.jit
def apply_epilogue(
    acc, bias, residual, ACTIVATION: tl.constexpr, scale=None, residual_scale=None, out_scale=None
):
    """act(acc * scale + bias + residual * residual_scale) * out_scale in fp32, each part optional.

    Args:
        acc: [BLOCK_M, BLOCK_N] fp32 or int32.
        bias: [BLOCK_N], one value a column.
        residual: [BLOCK_M, BLOCK_N].
        scale: [BLOCK_N] fp32.
        residual_scale, out_scale: one number.
    """
    v = acc.to(tl.float32)
    if scale is not None:
        v *= scale[None, :]
    if bias is not None:
        v += bias.to(tl.float32)[None, :]
    if residual is not None:
        r = residual.to(tl.float32)
        if residual_scale is not None:
            r *= residual_scale
        v += r
    v = apply_activation(v, ACTIVATION)
    if out_scale is not None:
        v *= out_scale
    return v


@triton.jit
def nearest_int8(v):
    """An fp32 tile rounded half to even and saturated to int8; NaN becomes 0."""
    if INTERPRETED:
        v = tl.where(v == v, v, 0.0)
        v = tl.minimum(tl.maximum(v, -128.0), 127.0)
        v = (v + 12582912.0) - 12582912.0  # 1.5 * 2**23, whose neighbours are 1 apart
        return v.to(tl.int8)
    else:  # one machine instruction does all of it to two values
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c, d;
            cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $2;
            cvt.rni.s32.f32 c, $3; cvt.rni.s32.f32 d, $4;
            cvt.pack.sat.s8.s32.b32 c, d, c, 0;
            cvt.pack.sat.s8.s32.b32 $0, b, a, c; }""",
            "=r,r,r,r,r",
            [v],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )


@triton.jit
def nearest_tf32(v):
    """`reference.round_tf32` of an fp32 tile, which is fp32 still.

    In integers, the same on every GPU: `cvt.rna.tf32` takes ties away from zero, and `cvt.rn.tf32`
    is of sm_90 and newer.
    """
    bits = v.to(tl.int32, bitcast=True)
    nearest = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
    return tl.where(tl.abs(v) < _TF32_LIMIT, nearest.to(tl.float32, bitcast=True), v)


@triton.jit
def round_to(v, DTYPE: tl.constexpr, ROUND_TF32: tl.constexpr = False):
    """An fp32 tile in the type it is stored in; 8-bit ones saturate, int8 rounds half to even.

    Args:
        ROUND_TF32: whether fp32 is rounded to TF32, for products that read it.
    """
    if ROUND_TF32:
        tl.static_assert(DTYPE == tl.float32, "TF32 is stored as fp32")
        v = nearest_tf32(v)
    if DTYPE == tl.int8:
        return nearest_int8(v)
    else:
        if DTYPE == tl.float8e4nv and INTERPRETED:  # machine code saturates as it converts
            v = tl.where(v > 448.0, 448.0, tl.where(v < -448.0, -448.0, v))  # NaN stays
        return v.to(DTYPE)


@triton.jit
def lowest(DTYPE: tl.constexpr):
    """What loses against every value of the type: the padding of a max pool."""
    BYTES: tl.constexpr = -128 if DTYPE == tl.int8 else -448.0
    return BYTES if DTYPE.primitive_bitwidth == 8 else float("-inf")
