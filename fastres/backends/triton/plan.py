"""A Plan: what is launched, in which order, on which memory, for one set of input shapes.

Plain data, so that it can be saved, read by other runners, and looked at. Every tensor of a plan
is named; 4-dimensional ones are NHWC.
"""

from __future__ import annotations

import msgspec

from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.geometry import Pair
from fastres.options import Sizes


class Place(msgspec.Struct, frozen=True):
    """A tensor in the arena: element type, packed shape, and its first byte."""

    shape: Sizes
    dtype: str
    offset: int


class Tile(msgspec.Struct, frozen=True):
    """Block sizes, warps and pipeline depth of a convolution; see `fastres.kernels.tiles`."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Shortcut(msgspec.Struct, frozen=True):
    """The residual operand of a convolution, read as source[:, ::stride, ::stride].

    Its channels stand from `channel_offset` on; the output's others get no residual. A stride of 1
    and an offset of 0 is the plain residual, the rest is ResNet's shortcut A.
    """

    source: str
    stride: int = 1
    channel_offset: int = 0


class LoadInput(msgspec.Struct, frozen=True, tag=True):
    """Converts an input, NCHW in the caller's dtype, to NHWC in the plan's."""

    node: str
    source: str
    target: str


class LaunchConv2d(msgspec.Struct, frozen=True, tag=True):
    """target = act(source * weight + bias + shortcut)."""

    node: str
    source: str
    target: str
    weight: str
    bias: str | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    shortcut: Shortcut | None
    activation: ActivationKind | None
    tile: Tile


class LaunchMaxPool(msgspec.Struct, frozen=True, tag=True):
    """target = maximum over each window of source."""

    node: str
    source: str
    target: str
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool


class LaunchGlobalAvgPool(msgspec.Struct, frozen=True, tag=True):
    """target [N, C] = mean of source [N, H, W, C] over H and W."""

    node: str
    source: str
    target: str


class LaunchLinear(msgspec.Struct, frozen=True, tag=True):
    """target = act(source @ weight.T + bias)."""

    node: str
    source: str
    target: str
    weight: str
    bias: str | None
    activation: ActivationKind | None


Step = LoadInput | LaunchConv2d | LaunchMaxPool | LaunchGlobalAvgPool | LaunchLinear


class Plan(msgspec.Struct, frozen=True):
    """Everything a runner needs besides the packed constants.

    Args:
        input_shapes: NCHW, what this plan is for.
        places: where each tensor of the plan lies.
        steps: in order of execution.
        outputs: tensor and logical NCHW shape of each output.
        arena_bytes: size of the one buffer that holds all places.
        allow_tf32: whether fp32 products may be rounded to TF32.
    """

    input_shapes: tuple[Sizes, ...]
    places: dict[str, Place]
    steps: tuple[Step, ...]
    outputs: tuple[tuple[str, Sizes], ...]
    arena_bytes: int
    allow_tf32: bool = False

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> Plan:
        """Reads a plan strictly.

        Raises:
            msgspec.ValidationError: a field is missing or has another type.
        """
        return msgspec.json.decode(data, type=cls)
