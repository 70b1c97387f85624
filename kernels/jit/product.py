"""The jit form of one step of a product's sum, and how fp8 sums keep the bits of fp32."""

import triton
import triton.language as tl


@triton.jit
def add_product(
    acc, a, b, INPUT_PRECISION: tl.constexpr, WIDEN: tl.constexpr, BY_STEPS: tl.constexpr
):
    """acc + a . b; BY_STEPS the tensor cores sum this step alone, and fp32 adds it to acc.

    See `fastres.kernels.tiles.depth.summed_by_steps`.

    Args:
        acc: [M, N] fp32, or int32.
        a, b: [M, K] and [K, N], of one type.
        WIDEN: to fp32 first.
    """
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if BY_STEPS:
        # the number keeps the compiler from making one instruction of both
        step = tl.dot(a, b, out_dtype=acc.dtype, max_num_imprecise_acc=a.shape[1])
        return acc + step
    else:
        return tl.dot(a, b, acc, input_precision=INPUT_PRECISION, out_dtype=acc.dtype)
