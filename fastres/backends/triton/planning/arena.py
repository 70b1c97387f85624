"""Memory for the values of a plan: one buffer, reused as soon as a value is read for the last time.

Values are placed from the largest to the smallest, each at the lowest offset where it overlaps
nothing that lives at the same time.
Source: Pisarchyk and Lee 2020, "Efficient Memory Management for Deep Neural Net Inference"
(arXiv:2001.03288), greedy by size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 256  # what CUDA's own allocator gives; tensor-map descriptors need 16


@dataclass(frozen=True)
class Lifetime:
    """A value of `size` bytes that lives from step `first` to step `last`, both included."""

    name: str
    size: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        return self.first <= other.last and other.first <= self.last


def place(lifetimes: Sequence[Lifetime]) -> tuple[dict[str, int], int]:
    """Offsets by name, and the size of the buffer."""
    placed: list[tuple[Lifetime, int]] = []
    for value in sorted(lifetimes, key=lambda v: (-v.size, v.first, v.name)):
        offset = 0
        for other, start in sorted((p for p in placed if p[0].meets(value)), key=lambda p: p[1]):
            if offset + value.size <= start:
                break
            offset = max(offset, _aligned(start + other.size))
        placed.append((value, offset))
    total = max((start + value.size for value, start in placed), default=0)
    return {value.name: start for value, start in placed}, _aligned(total)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
