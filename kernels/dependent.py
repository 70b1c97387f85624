"""Programmatic dependent launch, seen from inside a kernel: start early, wait, then work.

A kernel that was launched as dependent may start while the one in front of it still runs: its
blocks take the SMs that fall free, and launch latency hides behind that kernel's last blocks.

Source: PTX ISA, `griddepcontrol` (sm_90 and newer).
"""

import triton
import triton.language as tl


@triton.jit
def await_predecessor(DEPENDENT: tl.constexpr):
    """The first thing in every kernel: before it no memory is touched that another kernel writes.

    Every block lets the next kernel's blocks start, and then waits until the kernel in front has
    ended with all it wrote. As every kernel does so before it ends, the end of one means the end of
    all before it: what an earlier one still reads is never written over.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
