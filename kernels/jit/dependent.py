"""Programmatic dependent launch, seen from inside a kernel: start early, wait, then work.

A kernel that was launched as dependent may start while the one in front of it still runs: its
blocks take the SMs that fall free, and launch latency hides behind that kernel's last blocks.

Source: PTX ISA, `griddepcontrol` and `cp.async.bulk.prefetch` (sm_90 and newer).
"""

import triton
import triton.language as tl


@triton.jit
def share_of(BYTES: tl.constexpr):
    """This program's part of so many bytes: its first, and their number; below 1 if none is left.

    Both come in sixteens, which the copy engine asks for; the last few bytes may be left out.
    """
    share = tl.cdiv(tl.cdiv(BYTES, tl.num_programs(0)), 128) * 128
    first = tl.program_id(0) * share
    return first, tl.minimum(share, BYTES - first) & -16


@triton.jit
def prefetch_weights(weight_ptr, ELEMENTS: tl.constexpr, DEPENDENT: tl.constexpr):
    """Ahead of the wait: asks L2 for this program's share of weights, all programs for all of them.

    Nothing is read, so nothing old can be: it is a hint, which one thread gives in one instruction.

    Args:
        weight_ptr: packed elements; None for none.
    """
    if DEPENDENT and weight_ptr is not None:
        BYTES: tl.constexpr = ELEMENTS * weight_ptr.dtype.element_ty.primitive_bitwidth // 8
        first, size = share_of(BYTES)
        start = (weight_ptr.to(tl.int64) + first) & -16
        tl.inline_asm_elementwise(
            """{
            .reg .pred %mine, %some;
            .reg .b32 %thread;
            mov.u32 %thread, %tid.x;
            setp.eq.u32 %mine, %thread, 0;
            setp.gt.and.s32 %some, $2, 0, %mine;
            @%some cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.b32 $0, 0;
            }""",
            "=r,l,r",
            [start, size],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def await_predecessor(DEPENDENT: tl.constexpr):
    """The first thing in every kernel: before it no memory is read that another kernel writes.

    Every block lets the next kernel's blocks start, and then waits until the kernel in front has
    ended with all it wrote. As every kernel does so before it ends, the end of one means the end of
    all before it: what an earlier one still reads is never written over.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
