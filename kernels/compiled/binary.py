"""A compiled kernel as data: machine code, and what a launch of it has to know.

Imports neither torch nor triton. `build.py` makes binaries, where there is a compiler; `driver.py`
runs them, where there is a GPU. The header is strict JSON, the machine code is kept apart and
sealed by its digest.
"""

import hashlib
import struct
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import msgspec

from fastres.kernels.compiled.tensor_map import (
    TENSOR_MAP_BYTES,
    BoxLayout,
    TensorMap,
    TensorView,
    tensor_map,
)

Constant: TypeAlias = int | float | bool | str | None
Value: TypeAlias = int | float | TensorView | None
Part: TypeAlias = Literal["value", "shape", "stride", "global scratch", "profile scratch"]
FORMATS = {"i32": "<i", "i64": "<q", "fp32": "<f"}
DESCRIPTOR = "tensordesc"
_POINTER_FORMAT = "<Q"


class Parameter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One parameter of the machine code; they follow each other as its C signature has them.

    Args:
        argument: the kernel argument it comes from; "" for scratch memory.
        type: as Triton names it: "*fp16", "i32", "i64", "fp32", "tensordesc<fp16[2, 8, 8, 64]>".
        part: what of the argument is passed.
        dim: of the shape or stride.
        divisor: what the machine code takes the value to be a multiple of.
    """

    argument: str
    type: str
    part: Part = "value"
    dim: int = 0
    divisor: Literal[1, 16] = 1

    @property
    def is_descriptor(self) -> bool:
        """Whether it is a tensor map, which the driver has to encode."""
        return self.type.startswith(DESCRIPTOR)

    @property
    def size(self) -> int:
        """Bytes."""
        return TENSOR_MAP_BYTES if self.is_descriptor else struct.calcsize(self._format)

    def pack(self, value: int | float) -> bytes:
        """The bytes of a pointer or number.

        Raises:
            ValueError: it does not fit the type, or is no multiple of the divisor.
        """
        if self.divisor > 1 and value % self.divisor:
            raise ValueError(f"{self._label} is {value}, expected a multiple of {self.divisor}")
        try:
            return struct.pack(self._format, value)
        except (struct.error, OverflowError) as error:
            raise ValueError(f"{self._label} is {value!r}, expected a {self.type}") from error

    @property
    def _format(self) -> str:
        return _POINTER_FORMAT if self.type.startswith("*") else FORMATS[self.type]

    @property
    def _label(self) -> str:
        return self.argument if self.part == "value" else f"{self.argument} {self.part}".strip()


class Scratch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Device memory that a launch must bring along for the kernel's own use.

    Args:
        bytes: for each block of the grid; 0 for none.
        alignment: of the address, in bytes.
    """

    bytes: int
    alignment: int


class KernelHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a launch has to know of the machine code.

    Args:
        kernel: name of the function in it.
        sm: the target it was compiled for.
        num_warps: warps of 32 threads in a block.
        num_ctas: blocks in a cluster; the grid counts clusters.
        shared_bytes: dynamic shared memory a block asks for.
        global_scratch: memory of the kernel's own.
        profile_scratch: memory of an instrumented kernel.
        dependent: whether it may start before the kernel in front of it has ended.
        cooperative: whether all blocks must be on the GPU together.
        parameters: in C order.
        boxes: what the compiler says of each descriptor, by argument.
        constants: arguments that were compiled in: `tl.constexpr` ones, absent tensors, and
            numbers that were 1.
        triton: version of the compiler.
        sha256: digest of the machine code.
        schema: version of this format.

    Raises:
        ValueError: a parameter that `pack` could not pass on.
    """

    kernel: str
    sm: int
    num_warps: int
    num_ctas: int
    shared_bytes: int
    global_scratch: Scratch
    profile_scratch: Scratch
    dependent: bool
    cooperative: bool
    parameters: tuple[Parameter, ...]
    boxes: dict[str, BoxLayout]
    constants: dict[str, Constant]
    triton: str
    sha256: str
    schema: Literal[1] = 1

    def __post_init__(self) -> None:
        for parameter in self.parameters:
            _check_parameter(parameter, self)
        numbers = {
            "num_warps": (self.num_warps, 1, 32),
            "num_ctas": (self.num_ctas, 1, 16),
            "shared_bytes": (self.shared_bytes, 0, 2**20),
            "global_scratch": (self.global_scratch.bytes, 0, 2**31),
            "profile_scratch": (self.profile_scratch.bytes, 0, 2**31),
            "their alignment": (
                min(self.global_scratch.alignment, self.profile_scratch.alignment),
                1,
                2**31,
            ),
        }
        for name, (number, least, most) in numbers.items():
            if not least <= number <= most:
                raise ValueError(f"{name} is {number}, expected {least} to {most}")

    @property
    def signature(self) -> dict[str, str]:
        """Types of the arguments that are passed."""
        return {p.argument: p.type for p in self.parameters if p.part == "value"}


class KernelBinary(msgspec.Struct, frozen=True):
    """A header with its machine code.

    Args:
        header: what a launch has to know.
        cubin: the machine code, an ELF file for one architecture.

    Raises:
        ValueError: they do not belong together.
    """

    header: KernelHeader
    cubin: bytes

    def __post_init__(self) -> None:
        found = hashlib.sha256(self.cubin).hexdigest()
        if found != self.header.sha256:
            raise ValueError(
                f"the machine code of {self.header.kernel} has the digest {found[:12]}…, its "
                f"header expects {self.header.sha256[:12]}…: it is damaged or another kernel's"
            )

    def to_json(self) -> bytes:
        """The header as strict JSON; the machine code is saved beside it as it is."""
        return msgspec.json.format(msgspec.json.encode(self.header), indent=2)

    @classmethod
    def from_parts(cls, text: bytes, cubin: bytes) -> "KernelBinary":
        """What `to_json` gave, with the machine code.

        Raises:
            ValueError: no such header, or it does not belong to the machine code.
        """
        try:
            header = msgspec.json.decode(text, type=KernelHeader)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"this is no header of a compiled kernel: {error}") from error
        return cls(header, cubin)


def pack(
    header: KernelHeader,
    values: Mapping[str, Value | Constant],
    *,
    encode: Callable[[TensorMap], bytes],
    global_scratch: int = 0,
    profile_scratch: int = 0,
) -> list[bytes]:
    """The bytes of every parameter of a launch, in C order.

    A descriptor becomes its tensor map, sizes as i32 and strides in elements as i64; the two
    scratch pointers come last, 0 where there is none. Values of compiled-in arguments may be
    left out, and are checked where they are given.

    Args:
        header: of the kernel.
        values: arguments by name: addresses and numbers, a TensorView for a descriptor.
        encode: makes a tensor map's 128 bytes: `driver.encode_tensor_map`.
        global_scratch: address of grid · num_ctas · header.global_scratch.bytes.
        profile_scratch: likewise.

    Raises:
        ValueError: values that are missing, not the kernel's, or not what it was compiled for.
    """
    _check_names(header, values)
    scratch = {"global scratch": global_scratch, "profile scratch": profile_scratch}
    _check_scratch("global scratch", header.global_scratch, global_scratch)
    _check_scratch("profile scratch", header.profile_scratch, profile_scratch)
    packed: list[bytes] = []
    for parameter in header.parameters:
        name = parameter.argument
        value = scratch[parameter.part] if not name else values[name]
        if name in header.boxes:
            if not isinstance(value, TensorView):
                raise ValueError(f"{name} is {value!r}, expected a TensorView")
            if parameter.part == "shape":
                packed.append(parameter.pack(value.shape[parameter.dim]))
            elif parameter.part == "stride":
                packed.append(parameter.pack(value.strides[parameter.dim]))
            else:
                packed.append(encode(tensor_map(name, value, header.boxes[name])))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            packed.append(parameter.pack(value))
        else:
            raise ValueError(f"{name} is {value!r}, expected a {parameter.type}")
    return packed


def _check_names(header: KernelHeader, values: Mapping[str, Value | Constant]) -> None:
    signature = {p.argument: p.type for p in header.parameters if p.argument}
    missing = [name for name in signature if name not in values]
    unknown = [name for name in values if name not in signature and name not in header.constants]
    if missing or unknown:
        raise ValueError(
            f"{header.kernel} was given {unknown or 'nothing'} that it does not take, and not "
            f"{missing or 'anything'} that it takes"
        )
    for name, expected in header.constants.items():
        if name in values and values[name] != expected:
            raise ValueError(f"{name} is {values[name]!r}, compiled in is {expected!r}")


def _check_scratch(name: str, scratch: Scratch, address: int) -> None:
    if scratch.bytes and (address == 0 or address % scratch.alignment):
        raise ValueError(
            f"the {name} lies at address {address:#x}, expected {scratch.bytes} bytes for each "
            f"block at a multiple of {scratch.alignment}"
        )


def _check_parameter(parameter: Parameter, header: KernelHeader) -> None:
    """Refuses types that are not known, descriptors without a box, and what has no value."""
    known = parameter.type.startswith("*") or parameter.type in FORMATS
    if parameter.is_descriptor:
        known = parameter.argument in header.boxes
    if parameter.part in ("shape", "stride"):
        box = header.boxes.get(parameter.argument)
        known = known and box is not None and 0 <= parameter.dim < len(box.box)
    scratch = parameter.part in ("global scratch", "profile scratch")
    known = known and scratch == (parameter.argument == "")
    if not known:
        raise ValueError(f"no launch can pass on {parameter}")
