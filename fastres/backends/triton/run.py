"""Running a plan through the kernels' launchers: on a GPU by JIT, or in Triton's interpreter.

Everything a plan launches is bound once to an arena; on a GPU it is recorded into one CUDA graph,
so that a call costs its inputs' copies, one replay and its outputs' copies.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue

import torch

from fastres.backends.base import NodeTime
from fastres.backends.triton.bind import bind, load
from fastres.backends.triton.pack import Packed
from fastres.backends.triton.plan import AnyStep, LoadInput, Plan
from fastres.backends.triton.timing import milliseconds
from fastres.errors import OutOfMemory
from fastres.graph.ir import DTYPES
from fastres.kernels.launch import Launch, LaunchError, target_of

Record = Callable[[Callable[[], None]], Callable[[], None]]


class Context:
    """An arena with all of a plan's launches bound to it; one caller at a time uses it.

    Args:
        record: turns the launches into one call that repeats them; None launches them one by one.
    """

    def __init__(self, plan: Plan, constants: Packed, arena: torch.Tensor) -> None:
        self.arena = arena
        self.tensors = views(plan, arena)
        target = target_of(arena.device)
        self.bound: list[tuple[AnyStep, tuple[Launch, ...]]] = [
            (step, bind(step, self.tensors, constants, target, plan.allow_tf32))
            for step in plan.steps
        ]
        self.replay: Callable[[], None] | None = None

    def launch(self) -> None:
        """Launches all kernels, in order."""
        for _, launches in self.bound:
            for launch in launches:
                launch.run()


class PlanRunner:
    """One plan with the packed constants; several threads may run it, each in a context of its own.

    Args:
        plan: for the shapes of the inputs that will come.
        constants: packed weights by name, on the device.
        device: where everything lies.
        record: makes one call of all launches, as `record_cuda_graph`; None launches each by
            itself.
    """

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
        # One pool a stream: work on an arena may still be queued there when it is put back.
        self._idle: defaultdict[int, SimpleQueue[Context]] = defaultdict(SimpleQueue)
        self._loads = [step for step in plan.steps if isinstance(step, LoadInput)]

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs in NCHW and the plan's dtype, in memory of their own.

        The batch may be smaller than the plan's: the outputs' first images are returned.
        """
        with self.context() as context:
            self._load(inputs, context)
            if context.replay is None:
                context.replay = self._record(context.launch) if self._record else context.launch
            context.replay()
            return self._outputs(context, inputs[0].shape[0])

    def failing(self) -> tuple[AnyStep, LaunchError] | None:
        """Launches each step once on what the arena holds; the first that cannot, and why."""
        with self.context() as context:
            for step, launches in context.bound:
                try:
                    for launch in launches:
                        launch.run()
                except LaunchError as error:
                    return step, error
        return None

    def profile(self, inputs: Sequence[torch.Tensor]) -> list[NodeTime]:
        """Time, work and traffic of each step, each timed by itself after one run to warm up."""
        self.run(inputs)
        times = []
        with self.context() as context:
            for step, launches in context.bound:

                def work(step: AnyStep = step, launches: tuple[Launch, ...] = launches) -> None:
                    if isinstance(step, LoadInput):
                        self._load_one(step, inputs, context)
                    for launch in launches:
                        launch.run()

                costs = [launch.cost for launch in launches if launch.cost is not None]
                total = sum(costs[1:], costs[0]) if costs else None
                times.append(
                    NodeTime(
                        step.node,
                        milliseconds(work, self._device),
                        type(step).__name__,
                        None if total is None else total.flops,
                        None if total is None else total.bytes,
                    )
                )
        return times

    @contextmanager
    def context(self) -> Iterator[Context]:
        """A context that nobody else uses meanwhile."""
        on_gpu = self._device.type == "cuda"
        idle = self._idle[torch.cuda.current_stream(self._device).cuda_stream if on_gpu else 0]
        try:
            context = idle.get_nowait()
        except Empty:
            context = Context(self.plan, self._constants, self._new_arena())
        try:
            yield context
        finally:
            idle.put(context)

    def _load(self, inputs: Sequence[torch.Tensor], context: Context) -> None:
        for step in self._loads:
            self._load_one(step, inputs, context)

    def _load_one(self, step: LoadInput, inputs: Sequence[torch.Tensor], context: Context) -> None:
        load(step, inputs[self._loads.index(step)], context.tensors[step.target])

    def _outputs(self, context: Context, batch: int) -> list[torch.Tensor]:
        return [
            _nchw(context.tensors[name], shape)[:batch].clone() for name, shape in self.plan.outputs
        ]

    def _new_arena(self) -> torch.Tensor:
        """Memory for one context; what is in it does not matter."""
        size = self.plan.arena_bytes
        try:
            return torch.empty(size, dtype=torch.uint8, device=self._device)
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU
            shapes = ", ".join(str(list(shape)) for shape in self.plan.input_shapes)
            weights = self._constants.nbytes
            raise OutOfMemory(
                f"there is no room on {self._device} for the {size / 2**20:.0f} MiB that values "
                f"between kernels take for inputs {shapes}, besides {weights / 2**20:.0f} MiB of "
                "weights: use smaller batches (max_batch_size runs larger ones in parts), a "
                "16-bit precision, or free memory on the device"
            ) from error


def views(plan: Plan, arena: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plan's tensors by name, each a view of the arena."""
    found = {}
    for name, place in plan.places.items():
        dtype = DTYPES[place.dtype]
        size = math.prod(place.shape) * dtype.itemsize
        found[name] = arena[place.offset : place.offset + size].view(dtype).view(place.shape)
    return found


def _nchw(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of the plan in its logical shape; behind a Flatten that shape has rank 2."""
    is_map = tensor.dim() == 4 and len(shape) == 4
    return tensor.permute(0, 3, 1, 2) if is_map else tensor.reshape(shape)
