"""What a run launches, said without a GPU: calls on tensors of the meta device.

A job is a few calls that belong together, as data that can be sent to another process. Jobs stand
in order of promise: what a run launches first, and what it cannot do without, comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

import fastres
from bench.gpu.families import one_of_each
from bench.gpu.networks import NETWORKS
from bench.gpu.plans import Asked, Plan
from bench.gpu.questions import asking
from bench.gpu.run import FAST, TRIED, made, problems
from bench.kernels import cases as kernel_cases
from bench.kernels.cases import name_of
from bench.quantised import in_precision
from fastres.backends.triton.planning.eight_bits import FLOAT_OF
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.overlap import has_dependent_launch
from fastres.backends.triton.planning.plan import LoadInput
from fastres.backends.triton.planning.plan import Plan as NetworkPlan
from fastres.backends.triton.planning.problems import Problem
from fastres.backends.triton.planning.table import Tiles, shipped_for
from fastres.backends.triton.running.bind import load_launch
from fastres.backends.triton.running.contexts import views
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.shipping.cross import launches_of
from fastres.backends.triton.tuning.trial_eight_bits import make_trial
from fastres.backends.triton.tuning.tune import tiles_to_try
from fastres.graph.capture import capture
from fastres.graph.passes.pipeline import optimise
from fastres.kernels.cost import Target
from fastres.kernels.launch import Launch
from fastres.options import Precision

Job = tuple[Any, ...]  # what it is, and what tells it from others of its kind
META = torch.device("meta")


def jobs(plan: Plan, target: Target, image_size: int = 224) -> list[Job]:
    """What the sections of a plan launch, each job once; tests and peers are left out."""
    found = (_JOBS[a.section](a, target, image_size) for a in plan.sections if a.section in _JOBS)
    return list(dict.fromkeys(job for some in found for job in some))


def launches(job: Job) -> Iterator[Launch]:
    """The calls of a job, in both kinds of launch where they have them."""
    kind, *what = job
    target = built_for(job)
    for launch in _LAUNCHES[kind](*what):
        yield launch
        if kind != "tile" and "DEPENDENT" in launch.constants and has_dependent_launch(target):
            yield launch.overlapping()


def built_for(job: Job) -> Target:
    return next(part for part in job if isinstance(part, Target))


def _families(asked: Asked, target: Target, size: int) -> Iterator[Job]:
    yield from (("kernel", name_of(case), target) for case in one_of_each())


def _networks(asked: Asked, target: Target, size: int) -> Iterator[Job]:
    sizes = {"large": max(asked.batch_sizes), "one": 1}
    for precision, which in NETWORKS:
        yield "plan", asked.nets[0], "v1.5", precision, sizes[which], target, size


def _questions(asked: Asked, target: Target, size: int) -> Iterator[Job]:
    for case in asking.cases(Tiles(target, shipped_for(target))):
        if not asked.groups or case.name.startswith(tuple(asked.groups)):
            yield "question", case.name, target


def _tuning(asked: Asked, target: Target, size: int) -> Iterator[Job]:
    """The first tile of every problem, then the second of each, and so on."""
    found = [
        problem
        for version in ("v1.5", "v1")
        for batch in asked.batch_sizes
        for problem in problems(version, batch, asked.precisions, size, target)
    ]
    yield from (("tile", problem, rank, target) for rank in range(TRIED) for problem in found)


def _speed(asked: Asked, target: Target, size: int) -> Iterator[Job]:
    for version in ("v1.5", "v1"):
        for batch in asked.batch_sizes:
            for precision in FAST:
                yield "plan", "resnet50", version, precision, batch, target, size


def _of_case(name: str, target: Target) -> Iterator[Launch]:
    case = next(case for case in kernel_cases.cases() if name_of(case) == name)
    yield from _ours(case.pose(Tiles(target, shipped_for(target)), META).calls)


def _of_question(name: str, target: Target) -> Iterator[Launch]:
    found = asking.cases(Tiles(target, shipped_for(target)))
    yield from _ours(next(case for case in found if case.name == name).pose(META).calls)


def _of_tile(problem: Problem, rank: int, target: Target) -> Iterator[Launch]:
    for tile in tiles_to_try(problem, target)[rank : rank + 1]:
        yield from make_trial(problem, META).launches(tile, target)


def _of_plan(
    net: str, version: str, precision: Precision, batch: int, target: Target, size: int
) -> Iterator[Launch]:
    """With the tiles that are shipped, and pictures as floats of either size."""
    shape = (batch, 3, size, size)
    graph = optimise(capture(made(net, version).eval(), [fastres.Input(shape)]).graph)
    graph = in_precision(graph, shape, precision)
    tiles = Tiles(target, shipped_for(target))
    plan = make_plan(graph, (shape,), precision, tiles, dependent=False)
    constants = Packed(graph, FLOAT_OF[precision], META, tf32=precision == "tf32")
    yield from _loads(plan, constants)
    for _, launch in launches_of(plan, constants, target):
        yield launch


def _loads(plan: NetworkPlan, constants: Packed) -> Iterator[Launch]:
    arena = torch.empty(plan.arena_bytes, dtype=torch.uint8, device=META)
    tensors, shapes = views(plan, arena), iter(plan.input_shapes)
    for step in plan.steps:
        if isinstance(step, LoadInput):
            shape = next(shapes)
            for dtype in (torch.float16, torch.float32) if step.normalize is None else ():
                given = torch.empty(shape, dtype=dtype, device=META)
                yield load_launch(plan, step, given, tensors[step.target], constants)


def _ours(calls: Iterable[object]) -> Iterator[Launch]:
    return (call for call in calls if isinstance(call, Launch))


_JOBS: dict[str, Callable[[Asked, Target, int], Iterator[Job]]] = {
    "families": _families,
    "networks": _networks,
    "questions": _questions,
    "tuning": _tuning,
    "speed": _speed,
}
_LAUNCHES: dict[str, Callable[..., Iterator[Launch]]] = {
    "kernel": _of_case,
    "question": _of_question,
    "tile": _of_tile,
    "plan": _of_plan,
}
