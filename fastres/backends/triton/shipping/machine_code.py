"""Whether an engine's machine code runs here, and runners of it: checked, linked anew, compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastres.backends.base import CompiledParts
from fastres.backends.triton.planning.eight_bits import FLOAT_OF
from fastres.backends.triton.planning.plan import Plan
from fastres.backends.triton.running.answering import check_answers
from fastres.backends.triton.running.contexts import Record
from fastres.backends.triton.running.linked import LinkedPlan
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.running.run_driver import CudaDriver, Driver, DriverRunner
from fastres.backends.triton.shipping.stored_code import usable_code
from fastres.backends.triton.shipping.stored_kernels import KERNELS, MachineCode
from fastres.errors import ArtifactError
from fastres.graph.ir import Graph
from fastres.kernels.compiled.driver import DriverUnavailable
from fastres.kernels.cost import Target
from fastres.options import Precision


@dataclass(frozen=True)
class ReadyCode:
    """Machine code with a driver that runs it.

    Args:
        notes: what could not be used is said here.
    """

    code: MachineCode
    driver: Driver
    device: torch.device
    described: Packed  # the graph's constants on the meta device
    notes: list[str]

    def runner(self, plan: Plan, constants: Packed, record: Record | None) -> DriverRunner | None:
        """Runs a stored plan's machine code; None where there is none, or where it does not launch.

        Raises:
            ArtifactError: the linked plan is not what this plan links to.
            DeviceLost: the GPU answers no more: what is compiled here would not run either.
        """
        linked = next((x for x in self.code.plans if x.input_shapes == plan.input_shapes), None)
        if linked is None:
            return None
        self._compare(linked, plan)
        runner = DriverRunner(plan, linked, self.driver, constants, self.device, record)
        try:
            failed = runner.failing()
            if failed is None:
                return runner
            reason = f"{failed[0].node}: {failed[1]}"
        except RuntimeError as error:  # the driver refuses a tensor map
            check_answers(self.device, "machine code being loaded")
            reason = str(error)
        self.notes.append(f"machine code not used, compiled here instead: {reason}")
        return None

    def _compare(self, linked: LinkedPlan, plan: Plan) -> None:
        """Links the plan anew, which takes Triton; without it, the runner's own checks must do.

        Raises:
            ArtifactError: something else comes out.
        """
        try:
            from fastres.backends.triton.shipping.link_build import link
        except ImportError:
            return
        target = Target.typical(int(self.code.target.removeprefix("sm_")))  # as it was compiled
        try:
            expected = link(plan, self.described, target, self.code.headers)
        except ValueError as error:
            raise ArtifactError(f"{KERNELS} does not go with its plan: {error}") from error
        if linked != expected:
            raise ArtifactError(
                f"{KERNELS} gives the kernels of inputs {plan.input_shapes} other arguments than "
                "follow from its plan: it was altered. Build the engine anew"
            )


def ready_code(
    graph: Graph,
    precision: Precision,
    parts: CompiledParts,
    target: str,
    device: torch.device,
    notes: list[str],
) -> ReadyCode | None:
    """The machine code of a saved engine, where it is trusted and can run here.

    Args:
        notes: is told why not, where there is some for this architecture.

    Raises:
        ArtifactError: the files are damaged.
    """
    code, reason = usable_code(parts, target)
    if reason is not None:
        notes.append(reason)
    if code is None:
        return None
    try:
        driver = CudaDriver(list(code.kernels.values()), device)
    except DriverUnavailable as error:
        notes.append(f"machine code not used, compiled here instead: {error}")
        return None
    described = Packed(graph, FLOAT_OF[precision], torch.device("meta"))
    return ReadyCode(code, driver, device, described, notes)
