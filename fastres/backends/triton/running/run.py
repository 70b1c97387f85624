"""Running a plan through the kernels' launchers: on a GPU by JIT, or in Triton's interpreter.

Everything a plan launches is bound once to an arena; on a GPU it is recorded into one CUDA graph,
so that a call costs its inputs' copies, one replay and its outputs' copies. What lies outside of
the arena (`vendor.py`) has other memory at each run: whatever reads it is bound when it is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from fastres.backends.triton.planning.plan import AnyStep, LaunchVendor, LoadInput
from fastres.backends.triton.planning.vendor import convolve, vendor_cost
from fastres.backends.triton.running.answering import check_answers
from fastres.backends.triton.running.bind import bind, load
from fastres.backends.triton.running.contexts import Bound, Runner, title, total
from fastres.errors import UnsupportedError
from fastres.graph.specs import DTYPES
from fastres.kernels.cost import Cost, Target, target_of
from fastres.kernels.geometry import ConvShape
from fastres.kernels.launch import Launch, LaunchError

_Tensors = dict[str, torch.Tensor]


class PlanRunner(Runner):
    """A plan whose kernels Triton compiles when they are first launched."""

    failures = (LaunchError,)

    def bind(self, arena: torch.Tensor, tensors: _Tensors) -> Iterator[Bound]:
        target = target_of(arena.device)
        outside = {name for name, place in self.plan.places.items() if place.outside}
        last = {name: i for i, step in enumerate(self.plan.steps) for name in step.reads()}
        for number, step in enumerate(self.plan.steps):
            read = outside.intersection(step.reads())
            if isinstance(step, LaunchVendor):
                bound = Bound(step, (partial(self._by_vendor, step, tensors),), self._cost(step))
            elif read:
                there = tensors | {name: self._room(name, arena.device) for name in read}
                cost = total(x.cost for x in self._launches(step, there, target))
                bound = Bound(step, (partial(self._bound_late, step, tensors, target),), cost)
            else:
                launches = self._launches(step, tensors, target)
                bound = Bound(step, tuple(x.run for x in launches), total(x.cost for x in launches))
            yield bound._replace(last=tuple(name for name in read if last[name] == number))

    def load(self, step: LoadInput, given: torch.Tensor, target: torch.Tensor) -> None:
        try:
            load(self.plan, step, given, target, self._constants)
        except LaunchError as error:
            check_answers(self._device, title(step))
            what = f"the input {step.source} cannot be brought into the kernels' layout"
            raise UnsupportedError(f"{what}: {error}") from error

    def _launches(self, step: AnyStep, tensors: _Tensors, target: Target) -> tuple[Launch, ...]:
        return bind(self.plan, step, tensors, self._constants, target)

    def _bound_late(self, step: AnyStep, tensors: _Tensors, target: Target) -> None:
        for launch in self._launches(step, tensors, target):
            launch.run()

    def _by_vendor(self, step: LaunchVendor, tensors: _Tensors) -> None:
        residual = None if step.residual is None else tensors[step.residual]
        try:
            tensors[step.target] = convolve(
                tensors[step.source],
                self._constants.filters(step.weight),
                self._constants.narrow_bias(step.bias),
                residual,
                stride=step.stride,
                padding=step.padding,
                dilation=step.dilation,
                groups=step.groups,
            )
        except (RuntimeError, ValueError) as error:
            raise LaunchError(f"{step.tile} refuses: {error}") from error

    def _room(self, name: str, device: torch.device) -> torch.Tensor:
        place = self.plan.places[name]
        return torch.empty(place.shape, dtype=DTYPES[place.dtype], device=device)

    def _cost(self, step: LaunchVendor) -> Cost:
        weight = self._constants.filters(step.weight)
        (n, h, w, c), (k, r, s, _) = self.plan.places[step.source].shape, weight.shape
        windows = step.stride, step.padding, step.dilation, step.groups
        shape = ConvShape(n, h, w, c, k, r, s, *windows)
        return vendor_cost(shape, weight.element_size(), residual=step.residual is not None)
