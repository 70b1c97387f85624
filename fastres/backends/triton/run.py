"""Running a plan through the kernels' launchers: on a GPU by JIT, or in Triton's interpreter.

Everything a plan launches is bound once to an arena; on a GPU it is recorded into one CUDA graph,
so that a call costs its inputs' copies, one replay and its outputs' copies.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastres.backends.triton.answering import check_answers
from fastres.backends.triton.bind import bind, load
from fastres.backends.triton.contexts import Bound, Runner, title, total
from fastres.backends.triton.plan import LoadInput
from fastres.errors import UnsupportedError
from fastres.kernels.cost import target_of
from fastres.kernels.launch import LaunchError


class PlanRunner(Runner):
    """A plan whose kernels Triton compiles when they are first launched."""

    failures = (LaunchError,)

    def bind(self, arena: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Iterator[Bound]:
        target = target_of(arena.device)
        for step in self.plan.steps:
            launches = bind(self.plan, step, tensors, self._constants, target)
            yield Bound(step, tuple(x.run for x in launches), total(x.cost for x in launches))

    def load(self, step: LoadInput, given: torch.Tensor, target: torch.Tensor) -> None:
        try:
            load(self.plan, step, given, target, self._constants)
        except LaunchError as error:
            check_answers(self._device, title(step))
            what = f"the input {step.source} cannot be brought into the kernels' layout"
            raise UnsupportedError(f"{what}: {error}") from error
