"""The jit form of `fastres.kernels.epilogue.Epilogue`: what happens to an fp32 accumulator."""

import triton
import triton.language as tl


@triton.jit
def apply_activation(v, ACTIVATION: tl.constexpr):
    """act(v) on an fp32 tile; NaN stays NaN, as in PyTorch. ACTIVATION None returns v."""
    if ACTIVATION == "relu":
        # not tl.maximum(v, 0): that returns the number where the other operand is NaN
        v = tl.where(v < 0.0, 0.0, v)
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
def apply_epilogue(acc, bias, residual, ACTIVATION: tl.constexpr):
    """act(acc + bias + residual) in fp32; bias and residual may be None.

    Args:
        acc: [BLOCK_M, BLOCK_N] fp32.
        bias: [BLOCK_N], one value a column.
        residual: [BLOCK_M, BLOCK_N].
    """
    if bias is not None:
        acc += bias.to(tl.float32)[None, :]
    if residual is not None:
        acc += residual.to(tl.float32)
    return apply_activation(acc, ACTIVATION)
