"""The settings that an operation can have: law 8 of the IR."""

from __future__ import annotations

from collections.abc import Sequence

from fastres.errors import GraphError
from fastres.graph.ir import (
    AvgPool,
    BatchNorm,
    Concat,
    Conv2d,
    Flatten,
    MaxPool,
    Normalize,
    Op,
    Pad,
    Slice,
    Softmax,
)

_LARGEST = 2**31 - 1  # what kernels and libraries count with
_LARGEST_FLOAT = 3.4028234663852886e38  # of fp32


def check_settings(op: Op, ranks: Sequence[int]) -> None:
    """
    Args:
        ranks: of its operands.

    Raises:
        GraphError: a setting is no number that the operation can have, or does not fit the rank.
    """
    rank = ranks[0] if ranks else 0
    for setting in ("kernel", "stride", "dilation", "steps"):
        _within(setting, getattr(op, setting, ()), 1)
    for setting in ("padding", "before", "after"):
        _within(setting, getattr(op, setting, ()), 0)
    if isinstance(op, Conv2d):
        _within("groups", (op.groups,), 1)
    if isinstance(op, Conv2d | MaxPool | AvgPool) and rank != 4:
        raise GraphError(f"it takes [N, C, H, W], its input has {rank} dimensions")
    if isinstance(op, MaxPool | AvgPool) and any(
        2 * p > k for p, k in zip(op.padding, op.kernel, strict=True)
    ):
        raise GraphError(f"it pads by {op.padding}, more than half its window {op.kernel}")
    if isinstance(op, Softmax | Concat):
        _within("dim", (op.dim,), -rank if isinstance(op, Softmax) else 0, rank - 1)
    if isinstance(op, Flatten):
        _within("start_dim", (op.start_dim,), 0, rank)
    if isinstance(op, Pad) and not len(op.before) == len(op.after) == rank:
        raise GraphError(f"it pads {len(op.before)} and {len(op.after)} of {rank} dimensions")
    if isinstance(op, Slice):
        if not len(op.starts) == len(op.stops) == len(op.steps) == rank:
            raise GraphError(f"it does not slice each of {rank} dimensions")
        _within("starts", op.starts, -_LARGEST)  # as in Python, from the end
        _within("stops", [stop for stop in op.stops if stop is not None], -_LARGEST)
    if isinstance(op, Normalize):
        positive = (*op.std, op.scale)
        if not all(0 < value <= _LARGEST_FLOAT for value in positive):
            raise GraphError(f"its std is {op.std} and its scale {op.scale}; both must be above 0")
        if not all(abs(value) <= _LARGEST_FLOAT for value in op.mean):
            raise GraphError(f"its mean is {op.mean}, which is no number in fp32")
    if isinstance(op, BatchNorm) and not 0 <= op.eps <= _LARGEST_FLOAT:
        raise GraphError(f"its eps is {op.eps}; it must be 0 or above")


def _within(setting: str, values: Sequence[int], smallest: int, largest: int = _LARGEST) -> None:
    for value in values:
        if not smallest <= value <= largest:
            given = ", ".join(map(str, values))
            raise GraphError(f"its {setting} is {given}; it must be from {smallest} to {largest}")
