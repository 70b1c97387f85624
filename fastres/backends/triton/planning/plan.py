"""A Plan: what is launched, in which order, on which memory, for one set of input shapes.

Plain data, so that it can be saved, read by other runners, and looked at. Every tensor of a plan
is named; 4-dimensional ones are NHWC.
"""

from __future__ import annotations

import msgspec

from fastres.backends.base import Choice
from fastres.backends.triton.planning.vendor import VendorTile
from fastres.graph.ir import Normalize
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.geometry import Pair
from fastres.kernels.tiles import BoxTile, ChainTile, ConvTile, StemPoolTile
from fastres.options import Sizes


class Place(msgspec.Struct, frozen=True):
    """A tensor in the arena: element type, packed shape, and its first byte.

    Args:
        tf32: whether its fp32 values are rounded to TF32 as they are stored: products read it, and
            the caller does not get it.
        outside: of the arena: each run gives it memory, from the step that writes it to the last
            that reads it.
    """

    shape: Sizes
    dtype: str
    offset: int
    tf32: bool = False
    outside: bool = False


class Shortcut(msgspec.Struct, frozen=True):
    """The residual operand of a convolution, read as source[:, ::stride, ::stride].

    Its channels stand from `channel_offset` on; the output's others get no residual. A stride of 1
    and an offset of 0 is the plain residual, the rest is ResNet's shortcut A.
    """

    source: str
    stride: int = 1
    channel_offset: int = 0


class Scales(msgspec.Struct, frozen=True):
    """Of a step that reads 8 bits: what one step of each of its tensors stands for.

    Args:
        source: of what is multiplied, averaged or added to.
        weight: name of the weight's scales, one for each output channel; None without a weight.
        residual: of what is added; 1 of a floating-point one.
        target: of a quantised result; None of a floating-point one.
    """

    source: float = 1.0
    weight: str | None = None
    residual: float = 1.0
    target: float | None = None


class Step(msgspec.Struct, frozen=True, tag=True):
    """What is launched for `node`: tensors of the plan into other tensors of the plan."""

    node: str

    def reads(self) -> tuple[str, ...]:
        """Tensors that must be there."""
        raise NotImplementedError

    def writes(self) -> tuple[str, ...]:
        """Tensors that are there afterwards, scratch memory included."""
        raise NotImplementedError


class LoadInput(Step, frozen=True, tag=True):
    """target = the input `source`, NCHW in the caller's dtype, as NHWC in the plan's.

    Args:
        folded: 2x2 pixels are one of four times the channels, with a margin, as a stem reads them
            (`fastres.kernels.space_to_depth`).
        normalize: the input is decoded pictures, and this is done to them on the way.
        scale: of a quantised target; None of a floating-point one.
    """

    source: str
    target: str
    folded: bool = False
    normalize: Normalize | None = None
    scale: float | None = None

    def reads(self) -> tuple[str, ...]:
        return ()

    def writes(self) -> tuple[str, ...]:
        return (self.target,)


class _OneToOne(Step, frozen=True):
    source: str
    target: str

    def reads(self) -> tuple[str, ...]:
        return (self.source,)

    def writes(self) -> tuple[str, ...]:
        return (self.target,)


class LaunchConv2d(_OneToOne, frozen=True, tag=True):
    """target = act(source * weight + bias + shortcut).

    Args:
        merged: groups that are one product, with zeros for each other's channels.
    """

    weight: str
    bias: str | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    merged: int
    shortcut: Shortcut | None
    activation: ActivationKind | None
    tile: ConvTile
    scales: Scales | None = None

    def reads(self) -> tuple[str, ...]:
        return (self.source,) if self.shortcut is None else (self.source, self.shortcut.source)


class LaunchStem(_OneToOne, frozen=True, tag=True):
    """target = act(the 7x7 stride 2 convolution of a folded picture + bias)."""

    weight: str
    bias: str | None
    activation: ActivationKind | None
    tile: ConvTile
    scales: Scales | None = None


class LaunchStemPool(_OneToOne, frozen=True, tag=True):
    """target = the 3x3 stride 2 max pool of what `LaunchStem` computes, which is never stored."""

    weight: str
    bias: str | None
    activation: ActivationKind | None
    tile: StemPoolTile
    scales: Scales | None = None


class LaunchBoxConv2d(_OneToOne, frozen=True, tag=True):
    """target = act(source * weight + projected * projection + biases + residual), through boxes.

    Args:
        projected: another tensor whose 1x1 convolution, with the weight `projection` and its own
            stride, is summed into the same accumulator; None without one.
        filter: height and width of `weight`.
        workspace: scratch tensor for the parts of a split depth; None where it is not split.
        counters: 0 before and after each launch; None where no last part's program adds them all.
    """

    weight: str
    biases: tuple[str, ...]
    filter: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    projected: str | None
    projection: str | None
    projection_stride: Pair
    residual: str | None
    activation: ActivationKind | None
    workspace: str | None
    tile: BoxTile
    scales: Scales | None = None
    counters: str | None = None

    def reads(self) -> tuple[str, ...]:
        return (self.source, *(name for name in (self.projected, self.residual) if name))

    def writes(self) -> tuple[str, ...]:
        return (self.target, *(name for name in (self.workspace, self.counters) if name))


class LaunchVendor(_OneToOne, frozen=True, tag=True):
    """target = relu(source * weight + bias + residual), by PyTorch (`vendor.py`), which gives
    `target` its memory: it lies outside of the arena."""

    weight: str
    bias: str
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    residual: str | None
    tile: VendorTile

    def reads(self) -> tuple[str, ...]:
        return (self.source,) if self.residual is None else (self.source, self.residual)


class LinkScales(msgspec.Struct, frozen=True):
    """Of a chain in 8 bits: what steps stand for, and the names of the weights' scales.

    Args:
        weight2, weight3, weight1: scales by output channel.
        source, inner, target, next_target: of what is read, of the 3x3's result, and of both that
            are written.
        shortcut: of what is added.
    """

    weight2: str
    weight3: str
    weight1: str | None
    source: float
    inner: float
    target: float
    next_target: float | None
    shortcut: float


class LaunchChain(_OneToOne, frozen=True, tag=True):
    """target = act([b; x] * weight3 + biases3 + shortcut), with b = act(source * weight2 + bias2)
    a 3x3 that is never stored; and next_target = act(target * weight1 + bias1).

    Args:
        projection: weight of the 1x1 that projects `shortcut`; None where that is a residual.
        next_target: the next block's first 1x1; None ends the chain with `target`.
    """

    weight2: str
    bias2: str | None
    weight3: str
    biases3: tuple[str, ...]
    projection: str | None
    shortcut: str
    weight1: str | None
    bias1: str | None
    next_target: str | None
    stride: int
    shortcut_stride: int
    activation: ActivationKind | None
    tile: ChainTile
    scales: LinkScales | None = None

    def reads(self) -> tuple[str, ...]:
        return (self.source, self.shortcut)

    def writes(self) -> tuple[str, ...]:
        return (self.target, *((self.next_target,) if self.next_target else ()))


class LaunchMaxPool(_OneToOne, frozen=True, tag=True):
    """target = maximum over each window of source."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool


class LaunchAvgPool(_OneToOne, frozen=True, tag=True):
    """target = mean over each window of source."""

    kernel: Pair
    stride: Pair
    padding: Pair
    ceil_mode: bool
    count_include_pad: bool


class Norm(msgspec.Struct, frozen=True):
    """Names of a BatchNorm's constants, [C] each."""

    mean: str
    var: str
    weight: str | None
    bias: str | None
    eps: float


class LaunchElementwise(_OneToOne, frozen=True, tag=True):
    """target = act(norm(source) + residual), each part optional."""

    norm: Norm | None
    residual: str | None
    activation: ActivationKind | None
    scales: Scales | None = None

    def reads(self) -> tuple[str, ...]:
        return (self.source,) if self.residual is None else (self.source, self.residual)


class LaunchGlobalAvgPool(_OneToOne, frozen=True, tag=True):
    """target [N, C] = mean of source [N, H, W, C] over H and W."""

    scales: Scales | None = None


class LaunchLinear(_OneToOne, frozen=True, tag=True):
    """target = act(source @ weight.T + bias)."""

    weight: str
    bias: str | None
    activation: ActivationKind | None
    tile: ConvTile
    scales: Scales | None = None


AnyStep = (
    LoadInput
    | LaunchConv2d
    | LaunchStem
    | LaunchStemPool
    | LaunchBoxConv2d
    | LaunchVendor
    | LaunchChain
    | LaunchMaxPool
    | LaunchAvgPool
    | LaunchElementwise
    | LaunchGlobalAvgPool
    | LaunchLinear
)


class Plan(msgspec.Struct, frozen=True):
    """Everything a runner needs besides the packed constants.

    Args:
        input_shapes: NCHW, what this plan is for.
        places: where each tensor of the plan lies.
        steps: in order of execution.
        outputs: tensor and logical NCHW shape of each output.
        arena_bytes: size of the one buffer that holds all places.
        allow_tf32: whether fp32 products are those of TF32, on tensor cores.
        dependent: whether a kernel's blocks may start before the kernel in front has ended.
        choices: for people: what is run in which form, and why.
    """

    input_shapes: tuple[Sizes, ...]
    places: dict[str, Place]
    steps: tuple[AnyStep, ...]
    outputs: tuple[tuple[str, Sizes], ...]
    arena_bytes: int
    allow_tf32: bool = False
    dependent: bool = False
    choices: tuple[Choice, ...] = ()

    @property
    def libraries(self) -> set[str | None]:
        """What it was measured with, of steps that are not our kernels."""
        return {step.tile.library for step in self.steps if isinstance(step, LaunchVendor)}

    def timed_as(self, other: Plan) -> Plan:
        """With another's choices, where only times and what else there was may differ."""
        mine, theirs = (
            [(choice.nodes, choice.taken, choice.problem) for choice in plan.choices]
            for plan in (self, other)
        )
        return msgspec.structs.replace(self, choices=other.choices) if mine == theirs else self

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> Plan:
        """Reads a plan strictly.

        Raises:
            msgspec.ValidationError: a field is missing or has another type.
        """
        return msgspec.json.decode(data, type=cls)
