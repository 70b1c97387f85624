"""What a tensor map says, before the driver encodes it: pure data, no torch, triton or driver.

The copy engine (TMA, sm_90 and newer) moves boxes of a tensor; a tensor map tells it where the
tensor lies and how a box is laid out in shared memory. The compiler fixes one half (`BoxLayout`),
the call the other (`TensorView`); `tensor_map` joins them.

Source: Triton 3.9, backends/nvidia/driver.py `make_tensordesc_arg` and driver.c
`fillTMADescriptorTiled`; the limits are those of cuTensorMapEncodeTiled in the driver's manual.
"""

from typing import Literal

import msgspec

TENSOR_MAP_BYTES = 128
_TFLOAT32 = 11  # CU_TENSOR_MAP_DATA_TYPE_TFLOAT32: fp32 rounded to tf32 on the way
_FLOAT_TYPES = (6, 7, 8, 9, 10, 11, 12)  # CUtensorMapDataType from FLOAT16 to TFLOAT32_FTZ
_TYPES = range(13)
MAX_DIMS = 5


class BoxLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The compiler's half: how one box lies in shared memory.

    Args:
        element_type: CUtensorMapDataType, 6 for fp16, 7 for fp32, 9 for bf16.
        element_size: bytes.
        swizzle: CUtensorMapSwizzle: 0 none, 1, 2 and 3 for rows of 32, 64 and 128 bytes.
        box: elements of a box that one copy moves, outermost first; the compiler may make it
            narrower than the block of the program, which then takes several copies.
    """

    element_type: int
    element_size: Literal[1, 2, 4, 8]
    swizzle: Literal[0, 1, 2, 3]
    box: tuple[int, ...]


class TensorView(msgspec.Struct, frozen=True):
    """The call's half: a tensor in device memory.

    Args:
        address: of its first element, a multiple of 16.
        shape: sizes, outermost first.
        strides: in elements; the last is 1.
        fill_nan: what is read outside of the tensor: NaN instead of zero.
        tf32: whether fp32 values are rounded to tf32 as they are copied.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    fill_nan: bool = False
    tf32: bool = False


class TensorMap(msgspec.Struct, frozen=True):
    """The arguments of cuTensorMapEncodeTiled, innermost dimension first.

    Interleave (none), element strides (1) and L2 promotion (128 bytes) are the same for all.

    Args:
        element_type: CUtensorMapDataType.
        element_size: bytes.
        address: of the first element.
        sizes: in elements.
        strides: in bytes, of all dimensions but the innermost.
        box: in elements.
        swizzle: CUtensorMapSwizzle.
        fill_nan: whether elements outside of the tensor read as NaN.
    """

    element_type: int
    element_size: int
    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    fill_nan: bool

    @property
    def span(self) -> int:
        """Bytes from the first element to the start of the last."""
        strides = (self.element_size, *self.strides)
        return sum((size - 1) * stride for size, stride in zip(self.sizes, strides, strict=True))


def tensor_map(name: str, view: TensorView, layout: BoxLayout) -> TensorMap:
    """Joins the two halves, in the driver's order and units.

    Raises:
        ValueError: what the copy engine cannot do; the message begins with `name`.
    """
    rank = len(layout.box)
    if not len(view.shape) == len(view.strides) == rank <= MAX_DIMS:
        raise ValueError(
            f"{name} has shape {list(view.shape)} and strides {list(view.strides)}, expected "
            f"{rank} of each as in its box {list(layout.box)}, and no more than {MAX_DIMS}"
        )
    if not all(1 <= size <= 256 for size in layout.box) or layout.element_type not in _TYPES:
        raise ValueError(
            f"{name} has boxes of {list(layout.box)} elements of type {layout.element_type}, "
            "expected sides from 1 to 256 and a CUtensorMapDataType"
        )
    if view.address % 16:
        raise ValueError(f"{name} lies at address {view.address:#x}, expected a multiple of 16")
    if view.strides[-1] != 1:
        raise ValueError(f"{name} has stride {view.strides[-1]} in its last dimension, expected 1")
    if not all(1 <= size <= 2**32 for size in view.shape):
        raise ValueError(f"{name} has shape {list(view.shape)}, expected sizes from 1 to 2^32")
    strides = tuple(stride * layout.element_size for stride in view.strides[:-1])
    if not all(0 <= stride < 2**40 and stride % 16 == 0 for stride in strides):
        raise ValueError(
            f"{name} has strides of {list(strides)} bytes, expected multiples of 16 below 2^40"
        )
    if view.fill_nan and layout.element_type not in _FLOAT_TYPES:
        raise ValueError(f"{name} is filled with NaN, expected so of floating-point elements only")
    return TensorMap(
        element_type=_TFLOAT32 if view.tf32 else layout.element_type,
        element_size=layout.element_size,
        address=view.address,
        sizes=view.shape[::-1],
        strides=strides[::-1],
        box=layout.box[::-1],
        swizzle=layout.swizzle,
        fill_nan=view.fill_nan,
    )
