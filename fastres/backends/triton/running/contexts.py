"""What all runners of a plan share: arenas, one caller each, recorded once; inputs in, outputs out.

A runner says what is launched on an arena (`bind`) and how an input gets there (`load`); imports no
triton, which machine code does without.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch.profiler import record_function

from fastres.backends.base import NodeTime
from fastres.backends.context_pool import ContextPool
from fastres.backends.triton.planning.plan import AnyStep, LoadInput, Plan
from fastres.backends.triton.running.answering import answering, check_answers
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.running.timing import milliseconds
from fastres.errors import OutOfMemory
from fastres.graph.specs import DTYPES
from fastres.kernels.cost import Cost, least_seconds, target_of
from fastres.streams import current

Call = Callable[[], None]
Record = Callable[[Call], Call]
_PICTURES = 4  # dimensions


class Bound(NamedTuple):
    """The launches of one step on one arena, and what they cost where that is known.

    Args:
        last: tensors outside of the arena that no later step reads.
    """

    step: AnyStep
    calls: tuple[Call, ...]
    cost: Cost | None
    last: tuple[str, ...] = ()

    def release(self, tensors: dict[str, torch.Tensor]) -> None:
        """Gives back the memory of what was read for the last time."""
        for name in self.last:
            del tensors[name]

    def launch_one_by_one(self, device: torch.device, tell: bool = False) -> None:
        """Makes each call and waits for it.

        Raises:
            DeviceLost: the GPU answers no more; says after which.
        """
        for number, call in enumerate(self.calls, start=1):
            name = f"{title(self.step)}, launch {number} of {len(self.calls)}"
            with answering(device, name, tell):
                call()


class Context:
    """An arena with all of a plan's launches bound to it; one caller at a time uses it.

    Args:
        tensors: the plan's, views of the arena, and in a run those outside of it.
        bound: for each step of the plan.
    """

    def __init__(
        self, arena: torch.Tensor, tensors: dict[str, torch.Tensor], bound: Sequence[Bound]
    ) -> None:
        self.arena = arena
        self.tensors = tensors
        self.bound = bound
        self.given: tuple[torch.Tensor, ...] = ()  # what the recorded launches read as inputs
        self.replay: Call | None = None  # all launches as one call, once they are recorded

    def memory(self) -> tuple[torch.Tensor, ...]:
        return (self.arena, *self.given)


class Runner(ABC):
    """One plan with the packed constants; several threads may run it, each in a context of its own.

    Args:
        plan: for the shapes of the inputs that will come.
        constants: packed weights by name, on the device.
        device: where everything lies.
        record: makes one call of all launches, as `timing.recorder` gives; None launches each by
            itself.
    """

    failures: ClassVar[tuple[type[Exception], ...]]  # what a launch that cannot be made raises
    one_by_one = False  # whether calls wait for each launch, and say on stderr which it is

    def __init__(
        self,
        plan: Plan,
        constants: Packed,
        device: torch.device,
        record: Record | None = None,
    ) -> None:
        self.plan = plan
        self._constants = constants
        self._device = device
        self._record = record
        self._pool: ContextPool[Context] = ContextPool(device)
        self._loads = [step for step in plan.steps if isinstance(step, LoadInput)]

    @abstractmethod
    def bind(self, arena: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Iterable[Bound]:
        """What is launched for each step, on this arena."""

    @abstractmethod
    def load(self, step: LoadInput, given: torch.Tensor, target: torch.Tensor) -> None:
        """Brings an input of the caller's into the plan's memory; it may have fewer images."""

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs in NCHW and the plan's dtype, in memory of their own.

        The batch may be smaller than the plan's: the outputs' first images are returned. Where
        launches are recorded, those that bring inputs in are, too, behind a copy of each to where
        they read it: checking and launching them anew would take Python longer than a network of
        one image takes the GPU.
        """
        with self.context() as context:
            if self._records:
                self._copy(inputs, context)
            else:
                self._load(inputs, context)
            if context.replay is None:
                context.replay = self._replay_of(context)
            context.replay()
            return self._outputs(context, inputs[0].shape[0])

    def failing(self) -> tuple[AnyStep, Exception] | None:
        """Launches each step once on what the arena holds; the first that cannot, and why.

        Raises:
            DeviceLost: the GPU answers no more: no other tile would do.
        """
        with self.context() as context:
            for bound in context.bound:
                try:
                    bound.launch_one_by_one(self._device)
                except self.failures as error:
                    return bound.step, error
                bound.release(context.tensors)
        return None

    def profile(self, inputs: Sequence[torch.Tensor]) -> list[NodeTime]:
        """Time, work and traffic of each step, each timed by itself after one run to warm up."""
        self.run(inputs)
        times = []
        with self.context() as context:
            for bound in context.bound:
                step, calls, cost, _ = bound

                def work(step: AnyStep = step, calls: tuple[Call, ...] = calls) -> None:
                    if isinstance(step, LoadInput):
                        self._load_one(step, inputs, context)
                    for call in calls:
                        call()

                with record_function(step.node), answering(self._device, title(step)):
                    spent = milliseconds(work, self._device)
                bound.release(context.tensors)
                name = type(step).__name__
                if cost is None:
                    times.append(NodeTime(step.node, spent, name))
                    continue
                least = self._least(cost)
                times.append(NodeTime(step.node, spent, name, cost.flops, cost.bytes, least))
        return times

    def _least(self, cost: Cost) -> float | None:
        """Milliseconds that this GPU's rates allow; None in the interpreter."""
        if self._device.type != "cuda":
            return None
        itemsize = min(DTYPES[place.dtype].itemsize for place in self.plan.places.values())
        tensor_cores = itemsize < 4 or self.plan.allow_tf32
        return 1e3 * least_seconds(cost, target_of(self._device), itemsize, tensor_cores)

    @contextmanager
    def context(self) -> Iterator[Context]:
        """A context that nobody else uses meanwhile; its GPU is the current one."""
        with current(self._device), self._pool.context(self._new_context) as context:
            yield context

    def _new_context(self) -> Context:
        arena = self._new_arena()
        tensors = views(self.plan, arena)
        return Context(arena, tensors, tuple(self.bind(arena, tensors)))

    @property
    def _records(self) -> bool:
        return self._record is not None and not self.one_by_one

    def _copy(self, inputs: Sequence[torch.Tensor], context: Context) -> None:
        if not context.given:
            batches = (shape[0] for shape in self.plan.input_shapes)
            context.given = tuple(map(_room_for, inputs, batches))
        for room, given in zip(context.given, inputs, strict=True):
            room[: len(given)].copy_(given)

    def _load(self, inputs: Sequence[torch.Tensor], context: Context) -> None:
        for step in self._loads:
            if self.one_by_one:
                with answering(self._device, title(step), tell=True):
                    self._load_one(step, inputs, context)
            else:
                self._load_one(step, inputs, context)

    def _load_one(self, step: LoadInput, inputs: Sequence[torch.Tensor], context: Context) -> None:
        self.load(step, inputs[self._loads.index(step)], context.tensors[step.target])

    def _replay_of(self, context: Context) -> Call:
        if self.one_by_one:
            return partial(_launch_one_by_one, context.bound, context.tensors, self._device)
        launch = partial(_launch, context.bound, context.tensors)
        if self._record is None:
            return launch

        def all_of_it() -> None:
            self._load(context.given, context)
            launch()

        return self._record(all_of_it)

    def _outputs(self, context: Context, batch: int) -> list[torch.Tensor]:
        return [
            _nchw(context.tensors[name], shape)[:batch].clone() for name, shape in self.plan.outputs
        ]

    def _new_arena(self) -> torch.Tensor:
        """Memory for one context.

        Zeroed, as a batch smaller than the plan's leaves images as they are, and these are computed
        too, as is all that `failing` launches on: not on what others left in memory.
        """
        size = self.plan.arena_bytes
        try:
            return torch.zeros(size, dtype=torch.uint8, device=self._device)
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU
            check_answers(self._device, "something before memory was asked for")
            shapes = ", ".join(str(list(shape)) for shape in self.plan.input_shapes)
            weights = self._constants.nbytes
            raise OutOfMemory(
                f"there is no room on {self._device} for the {size / 2**20:.0f} MiB that values "
                f"between kernels take for inputs {shapes}, besides {weights / 2**20:.0f} MiB of "
                "weights: use smaller batches (max_batch_size runs larger ones in parts), a "
                "16-bit precision, or free memory on the device"
            ) from error


def _room_for(given: torch.Tensor, batch: int) -> torch.Tensor:
    """Zeros for so many images like these, laid out as these are, so that a copy is a plain one."""
    last = given.dim() == _PICTURES and not given.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    size = (batch, *given.shape[1:])
    return torch.empty(size, dtype=given.dtype, device=given.device, memory_format=layout).zero_()


def title(step: AnyStep) -> str:
    """A step in an error: its node, and what kind of launch it is."""
    return f"{step.node} ({type(step).__name__})"


def _launch(bound: Sequence[Bound], tensors: dict[str, torch.Tensor]) -> None:
    """Launches all kernels, in order."""
    for step in bound:
        for call in step.calls:
            call()
        step.release(tensors)


def _launch_one_by_one(
    bound: Sequence[Bound], tensors: dict[str, torch.Tensor], device: torch.device
) -> None:
    for step in bound:
        step.launch_one_by_one(device, tell=True)
        step.release(tensors)


def total(costs: Iterable[Cost | None]) -> Cost | None:
    """The sum of those that are known; None if none is."""
    known = [cost for cost in costs if cost is not None]
    return sum(known[1:], known[0]) if known else None


def views(plan: Plan, arena: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plan's tensors by name, each a view of the arena; none for those outside of it."""
    found = {}
    for name, place in plan.places.items():
        if place.outside:
            continue
        dtype = DTYPES[place.dtype]
        size = math.prod(place.shape) * dtype.itemsize
        found[name] = arena[place.offset : place.offset + size].view(dtype).view(place.shape)
    return found


def _nchw(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of the plan in its logical shape; behind a Flatten that shape has rank 2."""
    is_map = tensor.dim() == 4 and len(shape) == 4
    return tensor.permute(0, 3, 1, 2) if is_map else tensor.reshape(shape)
