"""Whether a linked plan (`linked.py`) lies within its plan's memory. Imports no triton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fastres.backends.triton.planning.plan import AnyStep, LoadInput, Plan
from fastres.backends.triton.running.linked import (
    Descriptor,
    InArena,
    Key,
    LinkedPlan,
    Pictures,
    Pointer,
    check_descriptor,
)
from fastres.kernels.compiled.binary import KernelHeader


def takes_pictures(step: AnyStep) -> bool:
    """Whether a kernel brings this input in; others are copied by PyTorch."""
    return isinstance(step, LoadInput) and step.normalize is not None


def check_linked(
    linked: LinkedPlan,
    plan: Plan,
    headers: Sequence[KernelHeader],
    constants: Mapping[Key, torch.Tensor],
) -> None:
    """Refuses a linked plan whose tensors do not lie within the plan's memory.

    That is all that can be seen of the data alone: where a kernel writes depends on the numbers
    that it is given as well. `link_build.link` makes the same anew to compare with.

    Args:
        headers: of the kernels it launches.
        constants: those of `linked.keys()`.

    Raises:
        ValueError: saying which launch and why.
    """
    if (linked.input_shapes, linked.arena_bytes) != (plan.input_shapes, plan.arena_bytes):
        raise ValueError(
            f"it is linked for inputs {linked.input_shapes} and {linked.arena_bytes} bytes, the "
            f"plan is for {plan.input_shapes} and {plan.arena_bytes}"
        )
    for index, step in enumerate(plan.steps):
        loads = sum(launch.step == index for launch in linked.launches)
        if takes_pictures(step) and loads != 1:
            raise ValueError(f"{loads} launches bring the pictures of {step.node} in, expected 1")
    for number, launch in enumerate(linked.launches):
        if not (0 <= launch.step < len(plan.steps) and 0 <= launch.kernel < len(headers)):
            raise ValueError(
                f"launch {number} is of step {launch.step} and kernel {launch.kernel}; there are "
                f"{len(plan.steps)} steps and {len(headers)} kernels"
            )
        what = f"launch {number} ({headers[launch.kernel].kernel})"
        if (Pictures() in launch.arguments.values()) != takes_pictures(plan.steps[launch.step]):
            raise ValueError(f"{what} reads pictures, or does not, unlike step {launch.step}")
        if not 0 <= launch.programs < 2**31:
            raise ValueError(f"{what} has {launch.programs} programs, expected 0 to 2^31 - 1")
        for pointer in launch.pointers():
            _check_pointer(what, pointer, plan.arena_bytes, constants)
        for name, argument in launch.arguments.items():
            if isinstance(argument, Descriptor):
                check_descriptor(what, name, argument, headers[launch.kernel])


def _check_pointer(
    what: str, pointer: Pointer, arena_bytes: int, constants: Mapping[Key, torch.Tensor]
) -> None:
    if isinstance(pointer, InArena):
        room, where = arena_bytes, "the arena"
    elif pointer.key in constants:
        room, where = constants[pointer.key].nbytes, f"the constant {pointer.key}"
    else:
        raise ValueError(f"{what} reads the constant {pointer.key}, which is not known")
    if pointer.offset < 0 or pointer.bytes < 0 or pointer.offset + pointer.bytes > room:
        raise ValueError(
            f"{what} is given {pointer.bytes} bytes at {pointer.offset} in {where}, which has "
            f"{room} bytes"
        )
    if pointer.offset % 16:
        raise ValueError(
            f"{what} is given memory at {pointer.offset} in {where}, no multiple of 16"
        )
