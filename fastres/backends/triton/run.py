"""Running a plan through the kernels' launchers: on a GPU by JIT, or in Triton's interpreter."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import torch

from fastres.backends.base import NodeTime
from fastres.backends.triton.plan import (
    LaunchConv2d,
    LaunchGlobalAvgPool,
    LaunchLinear,
    LaunchMaxPool,
    LoadInput,
    Plan,
    Step,
)
from fastres.graph.ir import DTYPES
from fastres.kernels.conv2d import conv2d
from fastres.kernels.linear import global_avg_pool, linear
from fastres.kernels.pool import max_pool
from fastres.kernels.tiles import ConvTile

if TYPE_CHECKING:
    from collections.abc import Iterator


class PlanRunner:
    """One plan with the packed constants; several threads may run it, each in an arena of its own.

    Args:
        plan: for the shapes of the inputs that will come.
        constants: packed weights by name, on the device.
        device: where everything lies.
    """

    def __init__(
        self, plan: Plan, constants: Mapping[str, torch.Tensor], device: torch.device
    ) -> None:
        self.plan = plan
        self._constants = constants
        self._device = device
        # One pool a stream: work on an arena may still be queued there when it is put back.
        self._idle: defaultdict[int, SimpleQueue[torch.Tensor]] = defaultdict(SimpleQueue)
        self._input_at = {
            step.source: i
            for i, step in enumerate(s for s in plan.steps if isinstance(s, LoadInput))
        }

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs in NCHW and the plan's dtype, in memory of their own."""
        with self._arena() as arena:
            tensors = self._views(arena)
            for step in self.plan.steps:
                self._do(step, tensors, inputs)
            return [_nchw(tensors[name], shape).clone() for name, shape in self.plan.outputs]

    def profile(self, inputs: Sequence[torch.Tensor]) -> list[NodeTime]:
        """Time of each step, after one run to warm up."""
        self.run(inputs)
        times = []
        with self._arena() as arena:
            tensors = self._views(arena)
            for step in self.plan.steps:
                self._synchronize()
                start = time.perf_counter()
                self._do(step, tensors, inputs)
                self._synchronize()
                spent = 1e3 * (time.perf_counter() - start)
                times.append(NodeTime(step.node, spent, type(step).__name__))
        return times

    def new_arena(self) -> torch.Tensor:
        """Memory for one run; what is in it does not matter."""
        return torch.empty(self.plan.arena_bytes, dtype=torch.uint8, device=self._device)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @contextmanager
    def _arena(self) -> Iterator[torch.Tensor]:
        on_gpu = self._device.type == "cuda"
        idle = self._idle[torch.cuda.current_stream(self._device).cuda_stream if on_gpu else 0]
        try:
            arena = idle.get_nowait()
        except Empty:
            arena = self.new_arena()
        try:
            yield arena
        finally:
            idle.put(arena)

    def _views(self, arena: torch.Tensor) -> dict[str, torch.Tensor]:
        views = {}
        for name, place in self.plan.places.items():
            dtype = DTYPES[place.dtype]
            size = math.prod(place.shape) * dtype.itemsize
            views[name] = arena[place.offset : place.offset + size].view(dtype).view(place.shape)
        return views

    def _do(
        self, step: Step, at: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> None:
        out = at[step.target]
        if isinstance(step, LoadInput):
            given = inputs[self._input_at[step.source]]
            out.copy_(given.permute(0, 2, 3, 1) if given.dim() == 4 else given)
        elif isinstance(step, LaunchConv2d):
            self._conv2d(step, at, out)
        elif isinstance(step, LaunchMaxPool):
            max_pool(
                at[step.source],
                kernel=step.kernel,
                stride=step.stride,
                padding=step.padding,
                dilation=step.dilation,
                ceil_mode=step.ceil_mode,
                out=out,
            )
        elif isinstance(step, LaunchGlobalAvgPool):
            global_avg_pool(at[step.source], out=_rows(out))
        elif isinstance(step, LaunchLinear):
            linear(
                _rows(at[step.source]),
                self._constants[step.weight],
                self._optional(step.bias),
                activation=step.activation,
                out=out,
                allow_tf32=self.plan.allow_tf32,
            )

    def _conv2d(
        self, step: LaunchConv2d, at: Mapping[str, torch.Tensor], out: torch.Tensor
    ) -> None:
        residual, offset = None, 0
        if step.shortcut is not None:
            stride, offset = step.shortcut.stride, step.shortcut.channel_offset
            residual = at[step.shortcut.source][:, ::stride, ::stride]
        tile = step.tile
        conv2d(
            at[step.source],
            self._constants[step.weight],
            self._optional(step.bias),
            stride=step.stride,
            padding=step.padding,
            dilation=step.dilation,
            groups=step.groups,
            residual=residual,
            residual_channel_offset=offset,
            activation=step.activation,
            out=out,
            tile=ConvTile(
                tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages
            ),
            allow_tf32=self.plan.allow_tf32,
        )

    def _optional(self, name: str | None) -> torch.Tensor | None:
        return None if name is None else self._constants[name]


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """A 1x1 map [N, 1, 1, C] as the matrix [N, C] that it is."""
    return tensor.flatten(1)


def _nchw(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of the plan in its logical shape; behind a Flatten that shape has rank 2."""
    is_map = tensor.dim() == 4 and len(shape) == 4
    return tensor.permute(0, 3, 1, 2) if is_map else tensor.reshape(shape)
