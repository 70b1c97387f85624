"""The tensors of a plan in the making: where each value of the graph lies, in which element type.

A value that is read in 8 bits is written so by the kernel that makes it, or else by one more;
where somebody wants it in floating point after all, it is turned back once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch

from fastres.backends.triton.planning.arena import Lifetime, place
from fastres.backends.triton.planning.eight_bits import FLOAT_OF, OPERAND_OF
from fastres.backends.triton.planning.plan import AnyStep, LaunchElementwise, Place, Scales
from fastres.graph.specs import DTYPE_NAMES
from fastres.options import Precision, Sizes

COUNTERS = ":counters"  # no value has such a name


class Tensors:
    """Tensors by name, with the steps that fill them.

    Args:
        shapes: of every value of the graph, NCHW.
        scales: of the values that are read in 8 bits.
        outputs: values that the network's caller gets, in floating point.
        precision: of the network.
        factors: in TF32: values that are rounded where they are stored, as products read them.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sizes],
        scales: Mapping[str, float],
        outputs: Sequence[str],
        precision: Precision,
        factors: Collection[str] = (),
    ) -> None:
        self.steps: list[AnyStep] = []
        self.places: dict[str, tuple[Sizes, torch.dtype]] = {}
        self._shapes, self._scales, self._outputs = shapes, scales, outputs
        self._dtype, self._eight = FLOAT_OF[precision], OPERAND_OF[precision]
        self._narrow = precision == "tf32"
        self.rounded = set(factors)  # tensors of TF32
        self.outside: set[str] = set()  # of the arena
        self._real: dict[str, str] = {}  # a value → the tensor it was written to
        self._whole: dict[str, str] = {}  # a value that is read in 8 bits → the tensor of that

    def __contains__(self, value: str) -> bool:
        return value in self._real

    def __getitem__(self, value: str) -> str:
        """The tensor that a value was written to."""
        return self._real[value]

    def place(self, value: str, whole: bool = False, outside: bool = False) -> float | None:
        """A tensor for a value that is about to be written: NHWC for maps.

        Args:
            whole: whether the kernel that writes it can round it to that.
            outside: whether it lies outside of the arena: whoever writes it makes it.

        Returns:
            The scale of a quantised tensor; None of a floating-point one.
        """
        shape = self._shapes[value]
        if len(shape) == 4:
            n, c, h, w = shape
            shape = (n, h, w, c)
        quantised = whole and value in self._scales and value not in self._outputs
        self._real[value] = value
        self.places[value] = shape, self._eight if quantised else self._dtype
        if quantised:
            self._whole[value] = value
        if outside:
            self.outside.add(value)
        return self._scales[value] if quantised else None

    def fold(self, value: str, shape: Sizes) -> None:
        """Gives a value that was placed another shape."""
        self.places[value] = shape, self.places[value][1]

    def scratch(self, name: str, size: int, dtype: torch.dtype) -> str:
        """A tensor of so many elements that is no value of the graph."""
        self.places[name] = (size,), dtype
        return name

    def counters(self, count: int) -> str:
        """A tensor of at least so many counters, the same for all launches of the plan.

        Each leaves zeros behind, and nothing else may lie there meanwhile.
        """
        (before,), dtype = self.places.get(COUNTERS, ((0,), torch.int32))
        self.places[COUNTERS] = (max(before, count),), dtype
        return COUNTERS

    def alias(self, value: str, source: str) -> None:
        """The same tensors under another name."""
        for tensors in (self._real, self._whole):
            if source in tensors:
                tensors[value] = tensors[source]

    def written(self, step: AnyStep) -> None:
        """Adds a step, and one to 8 bits for what it writes where that is still to be done."""
        self.steps.append(step)
        for value in step.writes():
            if value in self._scales and value not in self._whole:
                whole = self._whole[value] = f"{value}.quantized"
                self.places[whole] = self.places[value][0], self._eight
                self._cast(value, whole, Scales(target=self._scales[value]))

    def read(self, value: str, whole: bool = False) -> str:
        """The tensor in which a kernel reads a value.

        Args:
            whole: whether it takes that, and then gets it of a value that is read so.
        """
        if value not in self._scales:
            return self._real[value]
        if whole:
            return self._whole[value]
        real = f"{value}.dequantized"
        if real not in self.places:
            source = self._whole[value]
            self.places[real] = self.places[source][0], self._dtype
            self._cast(source, real, Scales(self._scales[value]))
        return real

    def factor(self, value: str, whole: bool = False) -> str:
        """The tensor in which a product reads a value: of TF32 in a network of that.

        Where that is no other's, as of a value that the caller gets in full, it is one more.
        """
        source = self.read(value, whole)
        if not self._narrow or source in self.rounded:
            return source
        narrow = f"{source}.rounded"
        if narrow not in self.places:
            self.places[narrow] = self.places[source]
            self.rounded.add(narrow)
            self.steps.append(LaunchElementwise(narrow, source, narrow, None, None, None))
        return narrow

    def placed(self) -> tuple[dict[str, Place], int]:
        """Where each tensor lies, and the bytes of the arena."""
        offsets, total = place(self.lifetimes())
        places = {
            name: Place(
                shape,
                DTYPE_NAMES[dtype],
                offsets.get(name, 0),
                name in self.rounded,
                name in self.outside,
            )
            for name, (shape, dtype) in self.places.items()
        }
        return places, total

    def lifetimes(self) -> list[Lifetime]:
        """From which step to which each tensor of the arena is needed."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for i, step in enumerate(self.steps):
            first.update(dict.fromkeys(step.writes(), i))
            last.update(dict.fromkeys((*step.writes(), *step.reads()), i))
        last.update(dict.fromkeys((self._real[name] for name in self._outputs), len(self.steps)))
        first[COUNTERS], last[COUNTERS] = 0, len(self.steps)  # from one run to the next
        return [
            Lifetime(name, math.prod(shape) * dtype.itemsize, first[name], last[name])
            for name, (shape, dtype) in self.places.items()
            if name not in self.outside
        ]

    def _cast(self, source: str, target: str, scales: Scales) -> None:
        self.steps.append(LaunchElementwise(target, source, target, None, None, None, scales))
