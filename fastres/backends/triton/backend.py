"""The Triton backend: our kernels on an NVIDIA GPU; for tests, in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fastres.backends.base import Account, CompiledParts, NodeTime, Refusal
from fastres.backends.shape_cache import ShapeCache, Shapes
from fastres.backends.triton.planning.eight_bits import FLOAT_OF, plain, precision_of
from fastres.backends.triton.shipping.stored_code import brings_code
from fastres.calib.table import CalibrationTable
from fastres.errors import BackendUnavailable, missing
from fastres.graph.ir import Graph
from fastres.graph.passes.quantise import eight_bits, quantise
from fastres.graph.specs import Sym
from fastres.options import DTYPE_OF, Options, Precision

if TYPE_CHECKING:
    from fastres.backends.triton.planning.plan import Plan
    from fastres.backends.triton.running.contexts import Record, Runner
    from fastres.backends.triton.running.pack import Packed
    from fastres.backends.triton.shipping.cross import CrossExecutable

_OLDEST = 80
_ONE_BY_ONE = "each launch is waited for and named on stderr (sync_launches): all times are longer"
_BUILT_FOR = (80, 86, 87, 89, 90, 100, 103, 120, 121)  # the compiler aborts at numbers between


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend:
    """fp32, tf32, fp16, bf16 and int8 on GPUs from sm_80 on, fp8 from sm_89 on."""

    name = "triton"
    checked = False

    def unavailable(
        self, target: str | None = None, compiled: CompiledParts | None = None
    ) -> str | None:
        without_triton = _without_triton()
        if without_triton is not None and not (compiled and brings_code(compiled)):
            return without_triton
        if target is not None:
            return _unbuildable(target)
        if _interpreting():
            return None
        if not torch.cuda.is_available():
            return (
                "there is no NVIDIA GPU (torch.cuda.is_available() is False); for tests, "
                "TRITON_INTERPRET=1 with device='cpu' runs the kernels in Triton's interpreter"
            )
        major, minor = torch.cuda.get_device_capability()
        if 10 * major + minor < _OLDEST:
            return f"the GPU is sm_{major}{minor}; the kernels need sm_{_OLDEST} or newer"
        return None

    def precision(self, wanted: Precision) -> str | None:
        return None if wanted in DTYPE_OF else f"triton runs {', '.join(DTYPE_OF)}, not {wanted}"

    def quantise(self, graph: Graph, table: CalibrationTable, precision: Precision) -> Graph:
        return quantise(graph, table, "skip", eight_bits(precision))

    def refusals(self, graph: Graph) -> tuple[Refusal, ...]:
        from fastres.backends.triton.planning.refusals import refusals

        return refusals(plain(graph).graph)

    def lower(
        self,
        graph: Graph,
        options: Options,
        shapes: Shapes,
        compiled: CompiledParts | None = None,
    ) -> TritonExecutable | CrossExecutable:
        if options.target is not None:
            from fastres.backends.triton.shipping.cross import build

            parts = compiled or CompiledParts()
            return build(graph, options, planned(shapes, is_batched(graph)), parts)
        return TritonExecutable(graph, options, self.device(options), shapes, compiled)

    def device(self, options: Options) -> torch.device:
        if options.target is not None:
            return torch.device("cuda", 0)
        if options.device is not None and options.device.index is not None:
            return options.device
        kind = options.device.type if options.device is not None else None
        if kind == "cpu" or (kind is None and not torch.cuda.is_available()):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())


def _without_triton() -> str | None:
    """What to do about it that there is no Triton; None where there is one."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return missing("triton", error)
    return None


def _unbuildable(target: str) -> str | None:
    if _interpreting():
        return "TRITON_INTERPRET=1 turns Triton's compiler off; unset it"
    sm = int(target.removeprefix("sm_"))
    if sm not in _BUILT_FOR:
        known = ", ".join(f"sm_{number}" for number in _BUILT_FOR)
        return f"kernels are built for {known}; sm_90 is H100 and H200"
    return None


class TritonExecutable:
    """Packed weights, and a plan for each input shape.

    Args:
        shapes: planned for at once, and tuned for where the options say so.
        compiled: plans and machine code of a saved engine; what was made for this kind of GPU is
            used, machine code where it is trusted.
    """

    def __init__(
        self,
        graph: Graph,
        options: Options,
        device: torch.device,
        shapes: Shapes,
        compiled: CompiledParts | None = None,
    ) -> None:
        from fastres.backends.triton.planning.lower import make_plan
        from fastres.backends.triton.running.answering import launched_one_by_one
        from fastres.backends.triton.running.pack import Packed
        from fastres.backends.triton.running.timing import recorder
        from fastres.backends.triton.shipping.machine_code import ready_code
        from fastres.backends.triton.shipping.stored import recorded
        from fastres.backends.triton.tuning.choosing import ban, tiles_for, tuned

        self._graph = graph
        self._batched = is_batched(graph)
        self._precision: Precision = options.precision or "fp32"
        precision = self._precision
        narrow = precision == "tf32"
        constants = Packed(graph, FLOAT_OF[precision], device, tf32=narrow)
        asked = options.dependent_launch
        tiles = tiles_for(options, device)
        if options.tune:
            tiles = tuned(graph, options, device, self._planned(shapes))
        self._tiles = tiles
        self._on_gpu = on_gpu = _is_gpu(device)  # where there is a compiler that may refuse
        record = recorder(device) if _wants_graph(options, device) else None
        self._parts = compiled or CompiledParts()
        self._target = f"sm_{tiles.target.sm}"
        stored = recorded(self._parts.files, self._target, tiles.library)
        one_by_one = launched_one_by_one(options)
        self._notes = [_ONE_BY_ONE] if one_by_one else []
        notes = self._notes
        code = ready_code(graph, precision, self._parts, self._target, device, notes)

        def make(shapes: Shapes) -> Runner:
            given = stored.get(shapes)
            while True:
                plan = make_plan(graph, shapes, precision, tiles, given, asked)
                if code is not None and given is not None:
                    linked = code.runner(plan, constants, record)
                    if linked is not None:
                        return linked
                runner = _compiling(plan, constants, device, record, notes)
                failed = runner.failing() if on_gpu else None
                if failed is None:
                    return runner
                step, error = failed
                ban(tiles, plan, step.node, str(error))
                given = None

        def switched(shapes: Shapes) -> Runner:
            runner = make(shapes)
            runner.one_by_one = one_by_one
            return runner

        self._make = switched  # knows nothing of this object, which so goes when it is let go of
        self._runners: ShapeCache[Runner] = ShapeCache(options.cache_size)
        self._runner(shapes)

    def account(self) -> Account:
        from fastres.backends.triton.planning.bounds import step_bounds

        banned = (f"not used: {why}" for why in self._tiles.banned.values())
        notes = (*self._notes, *banned)
        plan = self._runners.latest().plan
        bounds = step_bounds(plan, self._graph, self._tiles.target)
        return Account(choices=plan.choices, bounds=bounds, notes=notes)

    def compiled(self) -> CompiledParts:
        """The plans of a GPU, so that nothing is chosen or measured again.

        With the machine code that came with them, trusted as it was.
        """
        from fastres.backends.triton.shipping.stored import write_plans
        from fastres.backends.triton.shipping.stored_code import code_files

        if not self._on_gpu:
            return CompiledParts()
        plans = [runner.plan for runner in self._runners.entries()]
        code = code_files(self._parts.files, plans, self._target)
        return CompiledParts(write_plans(self._target, plans, ()) | code, self._parts.trusted)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self._runner(tuple(tuple(x.shape) for x in inputs)).run(inputs)

    def precisions(self) -> dict[str, str]:
        return {node.name: precision_of(node, self._precision) for node in self._graph.nodes}

    def profile(self, inputs: Sequence[torch.Tensor]) -> list[NodeTime]:
        return self._runner(tuple(tuple(x.shape) for x in inputs)).profile(inputs)

    def _runner(self, shapes: Shapes) -> Runner:
        return self._runners.get(self._planned(shapes), self._make)

    def _planned(self, shapes: Shapes) -> Shapes:
        return planned(shapes, self._batched)


def _compiling(
    plan: Plan,
    constants: Packed,
    device: torch.device,
    record: Record | None,
    notes: Sequence[str],
) -> Runner:
    """The runner that compiles its kernels.

    Raises:
        BackendUnavailable: there is no Triton to do that.
    """
    without_triton = _without_triton()
    if without_triton is not None:
        shapes = ", ".join(str(list(shape)) for shape in plan.input_shapes)
        why = "".join(f"\n{note}" for note in notes)
        raise BackendUnavailable(
            f"kernels for inputs {shapes} must be compiled here: {without_triton}{why}"
        )
    from fastres.backends.triton.running.run import PlanRunner

    return PlanRunner(plan, constants, device, record)


def _is_gpu(device: torch.device) -> bool:
    """Or the interpreter, which compiles nothing, and whose plans are of no use to anybody."""
    return device.type == "cuda"


def _wants_graph(options: Options, device: torch.device) -> bool:
    return device.type == "cuda" and options.cuda_graph is not False


def is_batched(graph: Graph) -> bool:
    """Whether every input and output is a batch of images."""
    specs = (*(value.spec for value in graph.inputs), *map(graph.spec, graph.outputs))
    return all(spec.shape[:1] == (Sym("N"),) for spec in specs)


def planned(shapes: Shapes, batched: bool) -> Shapes:
    """The shapes of the plan that serves these, here or where a plan is compiled for."""
    if not batched:
        return shapes
    n = bucket(shapes[0][0])
    return tuple((n, *shape[1:]) for shape in shapes)


def bucket(batch: int) -> int:
    """The batch that a plan is made for: at most an eighth more, so that plans stay few.

    Up to 16 each size has its own; above, there are eight in every doubling.
    """
    step = max(1, 1 << max(0, (batch - 1).bit_length() - 4))
    return -(-batch // step) * step
