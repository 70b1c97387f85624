"""Makes linked plans, from the launches of a plan bound on the meta device; needs triton."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping

import torch

from fastres.backends.triton.planning.plan import LoadInput, Plan
from fastres.backends.triton.running.bind import bind, load_launch
from fastres.backends.triton.running.contexts import views
from fastres.backends.triton.running.link import takes_pictures
from fastres.backends.triton.running.linked import (
    Argument,
    Descriptor,
    InArena,
    InConstant,
    LinkedLaunch,
    LinkedPlan,
    Pictures,
    Pointer,
    extent,
)
from fastres.backends.triton.running.pack import Packed
from fastres.kernels.aot import key_of
from fastres.kernels.compiled.binary import KernelHeader
from fastres.kernels.compiled.build import check_specialised, values_of
from fastres.kernels.compiled.tensor_map import TensorView
from fastres.kernels.cost import Target
from fastres.kernels.launch import Launch


def digest_of(launch: Launch) -> str:
    """Under which name the machine code of a launch is stored: a digest of its `key_of`."""
    return hashlib.sha256(key_of(launch).encode()).hexdigest()[:32]


def numbered(
    plan: Plan, arena: torch.Tensor, constants: Packed, target: Target
) -> Iterator[tuple[int, Launch]]:
    """Every launch of a plan with the number of its step; tensors may be on the meta device.

    Of the inputs, pictures are brought in by a launch, which takes them to lie packed.
    """
    tensors, shapes = views(plan, arena), iter(plan.input_shapes)
    for number, step in enumerate(plan.steps):
        if isinstance(step, LoadInput):
            shape = next(shapes)
            if takes_pictures(step):
                n, c, h, w = shape
                given = torch.empty((n, h, w, c), dtype=torch.uint8, device=arena.device)
                planar = given.permute(0, 3, 1, 2)
                yield number, load_launch(plan, step, planar, tensors[step.target], constants)
        for launch in bind(plan, step, tensors, constants, target):
            yield number, launch


def link(
    plan: Plan, constants: Packed, target: Target, kernels: Mapping[str, KernelHeader]
) -> LinkedPlan:
    """Every launch of a plan as data.

    Args:
        constants: on the meta device, of the plan's graph.
        target: the GPU.
        kernels: headers in their stored order, by `digest_of` the launches that run them.

    Raises:
        ValueError: a launch without a kernel, or with an argument that cannot be written down.
    """
    arena = torch.empty(plan.arena_bytes, dtype=torch.uint8, device="meta")
    numbers = {key: number for number, key in enumerate(kernels)}
    launches = []
    for index, launch in numbered(plan, arena, constants, target):
        key, node = digest_of(launch), plan.steps[index].node
        if key not in kernels:
            raise ValueError(f"{node}: there is no machine code of {launch.kernel}")
        check_specialised(launch, kernels[key])
        if kernels[key].global_scratch.bytes or kernels[key].profile_scratch.bytes:
            raise ValueError(f"{node}: {kernels[key].kernel} wants scratch memory")
        launches.append(
            LinkedLaunch(
                step=index,
                kernel=numbers[key],
                programs=launch.programs,
                arguments=_arguments(launch, arena, constants),
                cost=launch.cost,
            )
        )
    return LinkedPlan(plan.input_shapes, plan.arena_bytes, tuple(launches))


def _arguments(launch: Launch, arena: torch.Tensor, constants: Packed) -> dict[str, Argument]:
    found: dict[str, Argument] = {}
    for name, value in values_of(launch).items():
        given = launch.arguments[name]
        if isinstance(value, TensorView):
            base = _pointer(name, given.base, arena, constants)
            found[name] = Descriptor(base, value.shape, value.strides, value.fill_nan, value.tf32)
        elif isinstance(given, torch.Tensor) and given.dtype == torch.uint8:
            found[name] = Pictures()  # all else that a kernel is given are numbers
        elif isinstance(given, torch.Tensor):
            found[name] = _pointer(name, given, arena, constants)
        elif value is None or math.isfinite(value):
            found[name] = value
        else:
            raise ValueError(f"{name} is {value}, expected a finite number: JSON has no other")
    return found


def _pointer(name: str, tensor: torch.Tensor, arena: torch.Tensor, constants: Packed) -> Pointer:
    """Which memory a tensor is a view of; a meta tensor has no address, but it has a storage."""
    size = extent(tensor.shape, tensor.stride(), tensor.element_size())
    if _storage(tensor) == _storage(arena):
        return InArena(_start(tensor), size)
    for key, made in constants.made().items():
        offset = _start(tensor) - _start(made)
        if _storage(tensor) == _storage(made) and 0 <= offset <= made.nbytes - size:
            return InConstant(key, offset, size)
    raise ValueError(
        f"{name} is a tensor {list(tensor.shape)} outside of the arena and the packed constants"
    )


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _start(tensor: torch.Tensor) -> int:
    """The first byte, counted from the beginning of the storage."""
    return int(tensor.storage_offset()) * tensor.element_size()
