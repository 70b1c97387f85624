"""How the exporter's tensors lie in memory, for the few calls that depend on it.

The IR has no strides: a value is its numbers in their logical order, and whoever runs a graph lays
them out. `as_strided` reads memory, so capture writes down the order in which the model has it.
"""

from __future__ import annotations

import math

import torch

from fastres.graph.symbols import example


def memory_order(value: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions of a tensor from the outermost in memory to the innermost.

    None where that does not tell all: the tensor does not fill its storage, or its elements
    overlap or have gaps between them.
    """
    sizes, strides = (tuple(map(example, x)) for x in (value.shape, value.stride()))
    storage = example(value.untyped_storage().nbytes())
    if example(value.storage_offset()) or math.prod(sizes) * value.element_size() != storage:
        return None
    # a dimension of one may have any stride: it stays where it is
    wide = [i for i, size in enumerate(sizes) if size != 1]
    moved = iter(sorted(wide, key=lambda i: (-strides[i], i)))
    order = tuple(i if size == 1 else next(moved) for i, size in enumerate(sizes))
    expected = 1
    for i in reversed(order):
        if sizes[i] != 1 and strides[i] != expected:
            return None
        expected *= sizes[i]
    return order
