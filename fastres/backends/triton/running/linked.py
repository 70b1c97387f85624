"""A linked plan: every launch of a plan as plain data, ready for machine code and the CUDA driver.

What a launch is given is resolved as far as it can be without a GPU: an offset in the arena, a
packed constant by its key, a number, or what a descriptor says. Imports neither triton nor torch;
linked plans are made by `link_build.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import msgspec

from fastres.kernels.compiled.binary import KernelHeader, Value
from fastres.kernels.compiled.tensor_map import TensorView
from fastres.kernels.cost import Cost

Sizes: TypeAlias = tuple[int, ...]
Key: TypeAlias = tuple[str | float | None, ...]  # of a packed constant: how, and of which


class InArena(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="arena"):
    """A tensor in the arena: its first byte, and the bytes up to the end of its last element."""

    offset: int
    bytes: int


class InConstant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="constant"):
    """A tensor within a packed constant (`Packed.get`)."""

    key: Key
    offset: int
    bytes: int


class Pictures(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="pictures"):
    """The decoded pictures that a call brings: uint8 [N, H, W, 3], packed."""


Pointer: TypeAlias = InArena | InConstant


class Descriptor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="descriptor"):
    """A tensor that the copy engine reads or writes box by box; the box is in the kernel's header.

    Args:
        base: the tensor that it looks at.
        shape: sizes, outermost first.
        strides: in elements.
        fill_nan: what is read outside: NaN instead of zero.
        tf32: whether fp32 values are rounded to tf32 as they are copied.
    """

    base: Pointer
    shape: Sizes
    strides: Sizes
    fill_nan: bool
    tf32: bool

    def extent(self, itemsize: int) -> int:
        """Bytes up to the end of the last element."""
        return extent(self.shape, self.strides, itemsize)


Argument: TypeAlias = InArena | InConstant | Descriptor | Pictures | int | float | None


class LinkedLaunch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One launch of one compiled kernel.

    Args:
        step: index of the plan's step that it belongs to.
        kernel: index of the kernel among those stored.
        programs: size of the one-dimensional grid.
        arguments: by name; None for a tensor that is absent.
        cost: work and compulsory traffic, where the family can tell.
    """

    step: int
    kernel: int
    programs: int
    arguments: dict[str, Argument]
    cost: Cost | None = None

    def pointers(self) -> list[Pointer]:
        """Every tensor among the arguments, those behind descriptors included."""
        plain = (a.base if isinstance(a, Descriptor) else a for a in self.arguments.values())
        return [pointer for pointer in plain if isinstance(pointer, InArena | InConstant)]


class LinkedPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The launches of the plan for these input shapes.

    Where inputs and outputs lie is in the plan itself, which is always stored beside it.

    Args:
        input_shapes: of the plan.
        arena_bytes: of the plan.
        launches: in order of execution.
    """

    input_shapes: tuple[Sizes, ...]
    arena_bytes: int
    launches: tuple[LinkedLaunch, ...]

    def keys(self) -> list[Key]:
        """The packed constants that it reads, each once."""
        pointers = (pointer for launch in self.launches for pointer in launch.pointers())
        return list(dict.fromkeys(p.key for p in pointers if isinstance(p, InConstant)))


def extent(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """Bytes from a tensor's first element to the end of its last; 0 if it has none."""
    if 0 in shape:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return (last + 1) * itemsize


def values(
    launch: LinkedLaunch, arena: int, constants: Mapping[Key, int], pictures: int = 0
) -> dict[str, Value]:
    """A launch's arguments as `fastres.kernels.compiled.binary.pack` takes them.

    Args:
        arena: its address.
        constants: addresses of the packed constants, by key.
        pictures: address of those that a call brings.
    """

    def address(pointer: Pointer) -> int:
        base = arena if isinstance(pointer, InArena) else constants[pointer.key]
        return base + pointer.offset

    def value(argument: Argument) -> Value:
        if isinstance(argument, Descriptor):
            return TensorView(
                address(argument.base),
                argument.shape,
                argument.strides,
                argument.fill_nan,
                argument.tf32,
            )
        if isinstance(argument, Pictures):
            return pictures
        return address(argument) if isinstance(argument, InArena | InConstant) else argument

    return {name: value(argument) for name, argument in launch.arguments.items()}


def check_descriptor(what: str, name: str, box: Descriptor, header: KernelHeader) -> None:
    """Refuses what reaches beyond the tensor that it looks at.

    Raises:
        ValueError: so it does, or the kernel has no such descriptor.
    """
    layout = header.boxes.get(name)
    if layout is None or not len(box.shape) == len(box.strides) == len(layout.box):
        raise ValueError(f"{what} has no descriptor {name} of rank {len(box.shape)}")
    if min(box.shape) < 1 or min(box.strides) < 0:
        raise ValueError(f"{what}: {name} has shape {box.shape} and strides {box.strides}")
    if box.extent(layout.element_size) > box.base.bytes:
        raise ValueError(
            f"{what}: {name} spans {box.extent(layout.element_size)} bytes of a tensor of "
            f"{box.base.bytes}"
        )
