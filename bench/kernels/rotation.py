"""Passes that walk through more memory than L2 holds: no operand is still there from last time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from bench.kernels.posed import Posed

_TIMES_L2 = 3  # what all sets of operands hold together


def one_pass(posed: Posed) -> None:
    """Every call, in order."""
    for call in posed.calls:
        call.run()


def rotation(
    first: Posed, pose: Callable[[torch.device], Posed], device: torch.device, most: int
) -> list[Posed]:
    """A case with so many sets of operands that together they are larger than L2.

    Args:
        first: one of them.
        pose: lays out another.
        most: sets in all, also where they are too small for that.
    """
    if device.type != "cuda":
        return [first]
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    wanted = sets_for(operand_bytes(first), l2_bytes, most)
    return [first, *(pose(device) for _ in range(wanted - 1))]


def sets_for(set_bytes: int, l2_bytes: int, most: int) -> int:
    """How many sets of operands of that size are a few times as large as L2."""
    return max(1, min(most, -(-_TIMES_L2 * l2_bytes // set_bytes)))


def operand_bytes(posed: Posed) -> int:
    """Of all tensors of a pass, each counted once."""
    return sum({t.data_ptr(): t.nbytes for call in posed.calls for t in call.tensors()}.values())


def in_turn(sets: Sequence[Posed]) -> Callable[[], None]:
    """What runs one pass over the next set each time it is called."""
    turns = itertools.cycle(sets)
    return lambda: one_pass(next(turns))
