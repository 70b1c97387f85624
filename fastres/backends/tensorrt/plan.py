"""An engine as data: its layers, the shapes it takes, its bytes. Needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

Sizes = tuple[int, ...]
_POINTWISE = ("kgen", "PointWiseV2", "Reformat", "NoOp", "Signal", "Wait", "signal", "wait")


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer of an engine.

    Args:
        name, kind: TensorRT's words.
        nodes: our nodes that it computes, wholly or in part.
        reads, writes: the precisions of its inputs and outputs.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def multiplies(self) -> bool:
        """Whether it may be more than element by element."""
        return self.kind not in _POINTWISE


@dataclass(frozen=True)
class Range:
    """The shapes of one input that an engine takes; it is fastest at the usual one."""

    smallest: Sizes
    usual: Sizes
    largest: Sizes

    def holds(self, shape: Sizes) -> bool:
        return len(shape) == len(self.usual) and all(
            low <= size <= high
            for low, size, high in zip(self.smallest, shape, self.largest, strict=True)
        )


@dataclass(frozen=True)
class Built:
    """An engine's bytes, and its layers as the builder logged them."""

    plan: bytes
    layers: tuple[Layer, ...]
    timing_cache: bytes
