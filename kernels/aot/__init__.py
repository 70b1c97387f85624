"""Kernels compiled ahead of time for any GPU, without having one, and what their machine code uses.

A launch is built exactly as at run time, on tensors of the meta device, and never run.
`python -m fastres.kernels.aot.table --sm 90` prints a table over every kernel family.
"""

from fastres.kernels.aot.compiling import (
    TYPES,
    compile_kernel,
    compile_launch,
    key_of,
    source_of,
)
from fastres.kernels.aot.facts import MATRIX, KernelFacts, facts_of, fits, narrow_loads, stores

__all__ = [
    "MATRIX",
    "TYPES",
    "KernelFacts",
    "compile_kernel",
    "compile_launch",
    "facts_of",
    "fits",
    "key_of",
    "narrow_loads",
    "source_of",
    "stores",
]
