"""As much of saved plans as running them without PyTorch takes, and what must hold of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from fastres.backends.triton.running.linked import (
    Descriptor,
    InArena,
    InConstant,
    LinkedPlan,
    check_descriptor,
)
from fastres.errors import ArtifactError
from fastres.kernels.compiled.binary import KernelHeader

MARGIN, FOLDED = (2, 1), 16  # of a folded picture, as in fastres.kernels.folding
ELEMENTS = {"float16": "f2", "bfloat16": "u2", "float32": "f4", "int8": "i1", "int32": "i4"}


class Place(msgspec.Struct, frozen=True):
    shape: tuple[int, ...]
    dtype: str
    offset: int
    tf32: bool = False


class Normalize(msgspec.Struct, frozen=True):
    flip: bool


class Step(msgspec.Struct, frozen=True):
    """As much of a step as is needed of those that bring inputs in."""

    type: str
    source: str = ""
    target: str = ""
    folded: bool = False
    normalize: Normalize | None = None
    scale: float | None = None


class Plan(msgspec.Struct, frozen=True):
    """As much of a plan as is needed to bring inputs in and outputs out."""

    input_shapes: tuple[tuple[int, ...], ...]
    places: dict[str, Place]
    steps: tuple[Step, ...]
    outputs: tuple[tuple[str, tuple[int, ...]], ...]
    arena_bytes: int


class Plans(msgspec.Struct, frozen=True):
    target: str
    plans: tuple[Plan, ...]


class Constant(msgspec.Struct, frozen=True):
    stored: str


class Constants(msgspec.Struct, frozen=True):
    constants: dict[str, Constant]


class Graph(msgspec.Struct, frozen=True):
    graph: Constants


def check_linked(
    linked: LinkedPlan,
    plan: Plan,
    headers: Sequence[KernelHeader],
    weights: Mapping[Any, tuple[int, int]],
) -> None:
    """Refuses launches of memory that is not there.

    Raises:
        ArtifactError: naming the launch.
    """
    for number, x in enumerate(linked.launches):
        if not (0 <= x.kernel < len(headers) and 0 <= x.step < len(plan.steps)):
            raise ArtifactError(f"launch {number} is of kernel {x.kernel} and step {x.step}")
        if not 0 <= x.programs < 2**31:
            raise ArtifactError(f"launch {number} has {x.programs} programs")
        for pointer in x.pointers():
            assert isinstance(pointer, InArena | InConstant)
            room = plan.arena_bytes if isinstance(pointer, InArena) else weights[pointer.key][1]
            if pointer.offset < 0 or pointer.bytes < 0 or pointer.offset + pointer.bytes > room:
                raise ArtifactError(
                    f"launch {number} is given {pointer.bytes} bytes at {pointer.offset} of {room}"
                )
        for name, box in x.arguments.items():
            if isinstance(box, Descriptor):
                try:
                    check_descriptor(f"launch {number}", name, box, headers[x.kernel])
                except ValueError as error:
                    raise ArtifactError(str(error)) from error
    for name in (*plan.places, *(name for name, _ in plan.outputs)):
        place = plan.places.get(name)
        if place is None or place.dtype not in ELEMENTS:
            raise ArtifactError(f"{name} has no place, or one of a type that NumPy has not")
        size = math.prod(place.shape) * np.dtype(ELEMENTS[place.dtype]).itemsize
        lies = 0 <= place.offset <= place.offset + size <= plan.arena_bytes
        if min(place.shape, default=1) < 0 or not lies:
            raise ArtifactError(f"{name} lies outside of the {plan.arena_bytes} bytes of the plan")
    for name, shape in plan.outputs:
        n, *rest = shape if min(shape, default=0) > 0 else (0,)
        stored = plan.places[name].shape
        is_map = len(rest) == 3 and stored == (n, *rest[1:], rest[0])
        if not (is_map or (rest and stored[:1] == (n,) and math.prod(stored) == math.prod(shape))):
            raise ArtifactError(f"{name} lies there as {list(stored)}, expected {list(shape)}")


def check_inputs(plan: Plan, loads: Sequence[Step]) -> None:
    """Refuses inputs that would not lie where the plan has them.

    Raises:
        ArtifactError: naming the input.
    """
    if len(loads) != len(plan.input_shapes) or not loads:
        raise ArtifactError(f"{len(loads)} inputs are brought in of {len(plan.input_shapes)}")
    for step, shape in zip(loads, plan.input_shapes, strict=True):
        place = plan.places.get(step.target)
        if len(shape) not in (2, 4) or min(shape) < 1:
            raise ArtifactError(f"the input {step.source} is {list(shape)}")
        n, c, h, w = (*shape, 1, 1)[:4]
        stored: tuple[int, ...] = (n, h, w, c) if len(shape) == 4 else (n, c)
        if step.folded:
            stored = (n, *(size // 2 + sum(MARGIN) for size in (h, w)), FOLDED)
        odd = step.folded and (h % 2 or w % 2 or c > FOLDED // 4)
        flat = len(shape) == 2 and (step.folded or step.normalize)
        if place is None or place.shape != stored or odd or flat:
            raise ArtifactError(
                f"the input {step.source} of {list(shape)} is stored as "
                f"{None if place is None else list(place.shape)}, expected {list(stored)}"
            )
