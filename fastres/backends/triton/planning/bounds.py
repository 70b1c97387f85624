"""What holds up each step of a plan: arithmetic, device memory, L2 or the launch. Calculated.

Each is the time if nothing but that counted, at the rates of `fastres.kernels.cost`; none of them
is a prediction. What the largest is says what to do next about a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fastres.backends.base import Limit, StepBound
from fastres.backends.triton.planning.overlap import LAUNCH_US
from fastres.backends.triton.planning.plan import (
    AnyStep,
    LaunchBoxConv2d,
    LaunchChain,
    LaunchConv2d,
    LaunchLinear,
    LaunchStem,
    LaunchStemPool,
    LaunchVendor,
    LoadInput,
    Plan,
)
from fastres.backends.triton.planning.problems import Problem
from fastres.graph.ir import Graph
from fastres.graph.specs import DTYPES
from fastres.kernels.cost import Target, Work
from fastres.kernels.folding import TAPS, stem_shape
from fastres.kernels.geometry import ConvShape
from fastres.kernels.tiles.boxes import Projection
from fastres.kernels.tiles.chain import ChainShape
from fastres.options import Precision, Sizes

_PRECISION_OF: dict[str, Precision] = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "int8": "int8",
    "float8_e4m3fn": "fp8",
}


def step_bounds(plan: Plan, graph: Graph, target: Target) -> tuple[StepBound, ...]:
    """The bounds of every step, in order of execution.

    Args:
        plan: of this graph.
        target: the GPU it is for.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in graph.constants.items()}
    return _Reader(plan, shapes, target).bounds()


class _Reader:
    """Reads the sizes of a plan's steps off its tensors and weights."""

    def __init__(self, plan: Plan, weights: Mapping[str, Sizes], target: Target) -> None:
        self._plan = plan
        self._weights = weights
        self._target = target
        self._inputs = iter(plan.input_shapes)

    def bounds(self) -> tuple[StepBound, ...]:
        return tuple(self._bound(step) for step in self._plan.steps)

    def _bound(self, step: AnyStep) -> StepBound:
        target, problem = self._target, self._problem(step)
        if problem is None:
            work, arithmetic = self._streamed(step), 0.0
            form = type(step).__name__
        else:
            assert not isinstance(step, LoadInput)
            work, form = problem.work(step.tile), f"{problem.kind} {step.tile}"  # type: ignore[union-attr]
            sizes = problem.itemsize, problem.tensor_cores
            arithmetic = work.arithmetic_seconds(target, *sizes)
        us: dict[Limit, float] = {
            "arithmetic": 1e6 * arithmetic,
            "memory": 1e6 * work.memory_seconds(target),
            "l2": 1e6 * work.l2_seconds(target),
            "launch": LAUNCH_US * work.launches,
        }
        return StepBound(step.node, form, max(us, key=us.__getitem__), *us.values())

    def _problem(self, step: AnyStep) -> Problem | None:
        """What a step was reckoned as; None of one that multiplies nothing."""
        if isinstance(step, LaunchChain):
            return Problem("chain", self._chain(step), self._in(step.source))
        if isinstance(step, LaunchStem | LaunchStemPool):
            # a folded picture has a margin of three pixels
            n, h, w, _ = self._shape(step.source)
            shape = stem_shape(n, h - TAPS + 1, w - TAPS + 1, self._weights[step.weight][0])
            precision = self._in(step.source)
            if isinstance(step, LaunchStem):
                return Problem("folded stem", shape, precision)
            return Problem("stem and pool", shape, precision)
        if isinstance(step, LaunchLinear):
            k, c = self._weights[step.weight]
            shape = ConvShape(self._shape(step.target)[0], 1, 1, c, k, 1, 1)
            return Problem("pointers", shape, self._in(step.source))
        if isinstance(step, LaunchConv2d | LaunchBoxConv2d | LaunchVendor):
            return self._convolution(step)
        return None

    def _convolution(self, step: LaunchConv2d | LaunchBoxConv2d | LaunchVendor) -> Problem:
        n, h, w, c = self._shape(step.source)
        k, _, r, s = self._weights[step.weight]
        precision = self._in(step.source)
        sizes = (n, h, w, c, k, r, s, step.stride, step.padding, step.dilation)
        if isinstance(step, LaunchConv2d):
            shape = ConvShape(*sizes, step.groups // step.merged)
            adds = step.shortcut is not None
            return Problem("pointers", shape, precision, residual=adds, merged=step.merged)
        if isinstance(step, LaunchVendor):
            shape, adds = ConvShape(*sizes, step.groups), step.residual is not None
            library = step.tile.library
            return Problem("vendor", shape, precision, residual=adds, library=library)
        projection = None
        if step.projected is not None:
            projection = Projection(self._shape(step.projected)[3], step.projection_stride)
        narrow = self._itemsize(step.source) == 1
        others = [name for name in (step.target, step.residual) if name is not None]
        return Problem(
            "boxes",
            ConvShape(*sizes),
            precision,
            projection,
            residual=step.residual is not None,
            floating=narrow and any(self._itemsize(name) > 1 for name in others),
        )

    def _chain(self, step: LaunchChain) -> ChainShape:
        n, h, w, mid = self._shape(step.source)
        following = 0 if step.next_target is None else self._shape(step.next_target)[3]
        projected = 0 if step.projection is None else self._shape(step.shortcut)[3]
        strides = step.stride, step.shortcut_stride
        return ChainShape(n, h, w, mid, self._shape(step.target)[3], following, projected, *strides)

    def _streamed(self, step: AnyStep) -> Work:
        """Of a step that reads and writes each element once; inputs come as fp32, or as bytes."""
        moved = sum(self._bytes(name) for name in (*step.reads(), *step.writes()))
        if isinstance(step, LoadInput):
            moved += math.prod(next(self._inputs)) * (4 if step.normalize is None else 1)
        return Work(0, moved, moved)

    def _shape(self, name: str) -> Sizes:
        return self._plan.places[name].shape

    def _itemsize(self, name: str) -> int:
        return DTYPES[self._plan.places[name].dtype].itemsize

    def _bytes(self, name: str) -> int:
        return math.prod(self._shape(name)) * self._itemsize(name)

    def _in(self, name: str) -> Precision:
        """The precision of a product, by what it reads."""
        floating: Precision = "tf32" if self._plan.allow_tf32 else "fp32"
        return _PRECISION_OF.get(self._plan.places[name].dtype, floating)
