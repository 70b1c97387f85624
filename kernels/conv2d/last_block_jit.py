"""The jit form of a sum over the parts of a split depth, taken by whoever stores the last of them.

Nobody waits for anybody: a program stores its part, counts it, and goes on unless it was the last.
The parts are added in their order and not in that of their arrival: the same result every time,
and that of `split_k`.
"""

import triton
import triton.language as tl


@triton.jit
def is_last(part, parts_ptr, counters_ptr, tile, SUMS, SPLIT_K: tl.constexpr):
    """Stores one part of a sum; whether all the others are stored, too.

    The counter is 0 before the first part and after the last, so it need not be set anew for the
    next launch. Only a kernel that is broken off leaves another number, and what breaks a kernel
    off takes the memory of its whole process along.

    Plain stores, and not the copy engine's: the barrier has them all made, the release publishes
    them with what the threads beside stored before it, and the acquire has the last one see them.
    Source: PTX ISA, memory consistency model: causality order.

    Args:
        part: [BLOCK_M, BLOCK_N] of 32 bits.
        parts_ptr: memory of all parts, [SPLIT_K, SUMS, BLOCK_M, BLOCK_N].
        counters_ptr: [SUMS] int32, how many parts of each sum are stored.
        tile: number of the part: the first parts of all sums, then the second, and so on.
        SUMS: how many sums there are.
    """
    tl.store(parts_ptr + _elements(tile, part.shape[0], part.shape[1]), part)
    tl.debug_barrier()  # the atomic is one thread's: the stores of all have to be before it
    counter = counters_ptr + tile % SUMS
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def sum_in_order(
    parts_ptr, tile, SUMS, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The sum [BLOCK_M, BLOCK_N] that a part belongs to, once `is_last` says that all are there."""
    part = parts_ptr + _elements(tile % SUMS, BLOCK_M, BLOCK_N)
    stride = tl.cast(SUMS, tl.int64) * (BLOCK_M * BLOCK_N)
    acc = tl.load(part, cache_modifier=".cg")  # from L2, where all SMs' stores are
    for _ in tl.static_range(SPLIT_K - 1):
        part += stride
        acc += tl.load(part, cache_modifier=".cg")
    return acc


@triton.jit
def _elements(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the elements of a part lie."""
    within = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return tl.cast(tile, tl.int64) * (BLOCK_M * BLOCK_N) + within
