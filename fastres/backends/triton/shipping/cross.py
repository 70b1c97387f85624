"""Building for a GPU that is not here: every kernel of a plan compiled, looked at and listed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from fastres.backends.base import (
    Account,
    CompiledParts,
    KernelInfo,
    NodeTime,
    StepBound,
    elsewhere,
)
from fastres.backends.shape_cache import Shapes
from fastres.backends.triton.planning.bounds import step_bounds
from fastres.backends.triton.planning.eight_bits import FLOAT_OF, precision_of
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.plan import Plan
from fastres.backends.triton.planning.table import Tiles, shipped_for
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.shipping.link_build import digest_of, link, numbered
from fastres.backends.triton.shipping.stored import read_plans, recorded, write_plans
from fastres.backends.triton.shipping.stored_code import code_files, write_code
from fastres.backends.triton.tuning.choosing import ban
from fastres.errors import ArtifactError
from fastres.graph.ir import Graph
from fastres.kernels.aot import MATRIX, KernelFacts, fits, key_of
from fastres.kernels.compiled.build import Built, build_launch
from fastres.kernels.cost import Target
from fastres.kernels.launch import Launch
from fastres.options import Options, Precision
from fastres.text import progress_bar

_MOST_REGISTERS = 255  # of a thread


def spill_limit(sm: int) -> int:
    """Bytes that a thread may keep in local memory.

    On sm_120 the box kernels keep a few addresses of their epilogue there, outside the loops.
    """
    return 64 if sm >= 120 else 0


def launches_of(plan: Plan, constants: Packed, target: Target) -> list[tuple[str, Launch]]:
    """Every launch of a plan with the node it is for, on tensors of the meta device."""
    arena = torch.empty(plan.arena_bytes, dtype=torch.uint8, device="meta")
    launches = numbered(plan, arena, constants, target)
    return [(plan.steps[number].node, launch) for number, launch in launches]


class Unfit(Exception):
    """A kernel is not what it should be: it does not compile, does not fit, or spills."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(f"{node}: {reason}")
        self.node = node
        self.reason = reason


def compiled_plan(
    graph: Graph,
    shapes: Shapes,
    precision: Precision,
    tiles: Tiles,
    known: dict[str, Built],
    progress: Callable[[int, int], None] = lambda done, total: None,
    dependent: bool | None = None,
) -> tuple[Plan, tuple[KernelInfo, ...]]:
    """A plan whose every kernel compiles, fits, and keeps its values in registers.

    A tile that does not lead to one gives way to the next.

    Args:
        known: by the kernel's key, what was compiled before; is added to.
        dependent: as for `make_plan`.

    Raises:
        UnsupportedError: a problem has no such tile left; all that were tried are named.
    """
    constants = Packed(graph, FLOAT_OF[precision], torch.device("meta"))
    while True:
        plan = make_plan(graph, shapes, precision, tiles, dependent=dependent)
        launches = launches_of(plan, constants, tiles.target)
        try:
            return plan, compile_launches(launches, tiles.target, known, progress)
        except Unfit as unfit:
            ban(tiles, plan, unfit.node, unfit.reason)


def compile_launches(
    launches: Sequence[tuple[str, Launch]],
    target: Target,
    known: dict[str, Built],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[KernelInfo, ...]:
    """Compiles each distinct kernel once.

    Args:
        known: by the kernel's key, what was compiled before; is added to.
        progress: called with how many of how many kernels are compiled.

    Raises:
        Unfit: by a kernel that is not what it should be.
    """
    groups, reports = _groups(launches), []
    for done, (key, group) in enumerate(groups.items()):
        progress(done, len(groups))
        if key not in known:
            known[key] = _compiled(*group[0], target)
        reports.append(_report(group, known[key].facts))
    progress(len(groups), len(groups))
    return tuple(reports)


def _compiled(node: str, launch: Launch, target: Target) -> Built:
    what = f"{launch.kernel.__name__} with {launch.tile}"
    try:
        built = build_launch(launch, target.sm)
    except Exception as error:  # Triton raises many kinds
        raise Unfit(
            node, f"{what} does not compile for sm_{target.sm}: {type(error).__name__}: {error}"
        ) from error
    facts = built.facts
    if not fits(facts, target.sm):
        raise Unfit(
            node,
            f"{what} asks for {facts.shared_bytes} bytes of shared memory; sm_{target.sm} has "
            f"{target.shared_bytes}",
        )
    if facts.spill_stores > spill_limit(target.sm):
        raise Unfit(node, f"{what} spills {facts.spill_stores} bytes of registers")
    if launch.dependent and facts.unguarded:
        raise Unfit(
            node, f"{what} touches memory {facts.unguarded} times before it waits for its input"
        )
    return built


def _report(group: Sequence[tuple[str, Launch]], facts: KernelFacts) -> KernelInfo:
    return KernelInfo(
        *_named(group),
        registers=facts.registers,
        spilled=facts.spill_stores,
        shared_bytes=facts.shared_bytes,
        instructions=_mix(facts),
    )


def _check_kernels(
    kernels: Sequence[KernelInfo], launches: Sequence[tuple[str, Launch]], target: Target
) -> None:
    """Refuses kernels from a file that are not those of these launches, or that cannot be.

    Raises:
        ArtifactError: so it is.
    """
    follow = [_named(group) for group in _groups(launches).values()]
    possible = all(
        info.registers <= _MOST_REGISTERS
        and info.spilled <= spill_limit(target.sm)
        and info.shared_bytes <= target.shared_bytes
        for info in kernels
    )
    if not possible or follow != [(info.kernel, info.nodes, info.tile) for info in kernels]:
        raise ArtifactError(
            "a stored plan lists other kernels than follow from it: copy the engine anew"
        )


def _groups(launches: Sequence[tuple[str, Launch]]) -> dict[str, list[tuple[str, Launch]]]:
    """The launches by the kernel that they share, which is compiled once."""
    groups: dict[str, list[tuple[str, Launch]]] = {}
    for node, launch in launches:
        groups.setdefault(key_of(launch), []).append((node, launch))
    return groups


def _named(group: Sequence[tuple[str, Launch]]) -> tuple[str, tuple[str, ...], str]:
    """A kernel's name, the nodes that launch it, and its tile."""
    launch = group[0][1]
    name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    return name, tuple(node for node, _ in group), launch.tile


def _mix(facts: KernelFacts) -> dict[str, int]:
    """Matrix instructions by name, and memory accesses by kind and width; those that occur."""
    mix: dict[str, int] = {}
    for name, count in facts.instructions.items():
        kind, *rest = name.split(".")
        if MATRIX.match(name):
            key = kind
        elif kind in ("UTMALDG", "UTMASTG", "LDGSTS", "LDG", "STG"):
            key = ".".join([kind, *(part for part in rest if part in ("128", "64"))])
        elif kind == "FFMA":
            key = kind
        else:
            continue
        mix[key] = mix.get(key, 0) + count
    return dict(sorted(mix.items()))


class CrossExecutable:
    """A plan for another machine, with the facts of its kernels; it cannot run here.

    Args:
        plan: for the usual input shapes.
        kernels: what each distinct kernel was compiled to.
        bounds: what holds up each step of the plan.
        code: files of the kernels' machine code.
    """

    def __init__(
        self,
        plan: Plan,
        kernels: tuple[KernelInfo, ...],
        bounds: tuple[StepBound, ...],
        target: str,
        nodes: Mapping[str, str],
        code: Mapping[str, bytes],
    ) -> None:
        self.plan = plan
        self._kernels = kernels
        self._bounds = bounds
        self._target = target
        self._code = dict(code)
        self._precisions = dict(nodes)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        raise elsewhere(self._target)

    def profile(self, inputs: Sequence[torch.Tensor]) -> list[NodeTime]:
        raise elsewhere(self._target)

    def precisions(self) -> dict[str, str]:
        return dict(self._precisions)

    def account(self) -> Account:
        return Account(self._kernels, self.plan.choices, self._bounds)

    def compiled(self) -> CompiledParts:
        return CompiledParts(write_plans(self._target, [self.plan], self._kernels) | self._code)


def build(
    graph: Graph, options: Options, shapes: Shapes, compiled: CompiledParts
) -> CrossExecutable:
    """Plans a graph for `options.target` and compiles every kernel of the plan.

    Args:
        compiled: of a saved engine: a plan for this target is taken from there, with what its
            kernels were compiled to, and with their machine code, which nothing runs here.

    Raises:
        ArtifactError: that plan is not one of this graph, or the files are damaged.
        UnsupportedError: a kernel cannot be compiled, or a weight is beyond the precision's range.
    """
    precision = options.precision or "fp32"
    assert options.sm is not None and options.target is not None
    target = Target.typical(options.sm)
    ran = {node.name: precision_of(node, precision) for node in graph.nodes}
    stored = recorded(compiled.files, options.target).get(shapes)
    if stored is not None:
        plan = make_plan(graph, shapes, precision, Tiles(target), stored)
        known = read_plans(compiled.files)
        code = code_files(compiled.files, [plan], options.target)
        kernels = known.kernels if known else ()
        if kernels:
            constants = Packed(graph, FLOAT_OF[precision], torch.device("meta"))
            _check_kernels(kernels, launches_of(plan, constants, target), target)
        bounds = step_bounds(plan, graph, target)
        return CrossExecutable(plan, kernels, bounds, options.target, ran, code)
    built: dict[str, Built] = {}
    with progress_bar(f"compiling for {options.target}") as report:
        tiles = Tiles(target, shipped_for(target))
        plan, kernels = compiled_plan(
            graph, shapes, precision, tiles, built, report, options.dependent_launch
        )
    code = _linked(graph, plan, precision, target, built)
    bounds = step_bounds(plan, graph, target)
    return CrossExecutable(plan, kernels, bounds, options.target, ran, code)


def _linked(
    graph: Graph, plan: Plan, precision: Precision, target: Target, built: Mapping[str, Built]
) -> dict[str, bytes]:
    """The files of a plan's machine code."""
    constants = Packed(graph, FLOAT_OF[precision], torch.device("meta"))
    launches = [launch for _, launch in launches_of(plan, constants, target)]
    binaries = {digest_of(launch): built[key_of(launch)].binary for launch in launches}
    headers = {key: binary.header for key, binary in binaries.items()}
    linked = link(plan, constants, target, headers)
    return write_code(f"sm_{target.sm}", binaries, [linked])
