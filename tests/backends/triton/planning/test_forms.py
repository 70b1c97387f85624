"""Which form is taken: measured times are compared with each other, or estimates; never both."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
import pytest

import fastres
from fastres.backends.triton.planning.form import Form, Way, instead, preferred, quickest, several
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.plan import (
    LaunchBoxConv2d,
    LaunchChain,
    LaunchConv2d,
    LaunchStemPool,
    Plan,
)
from fastres.backends.triton.planning.problems import Problem
from fastres.backends.triton.planning.table import Entry, Machine, Table, Tiles
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.kernels.cost import Target

HOPPER = Target.typical(90)
MACHINE = Machine("a GPU", 132, "", "")
SHORT, LONG = 1e-3, 1e6  # microseconds


@cache
def graph_of(name: str) -> Graph:
    weights = getattr(fastres.models, name)(seed=0).state_dict()
    return optimise(fastres.build(weights, version="v1.5"))


def plan_of(
    time: Callable[[Problem], float | None], name: str = "resnet50", batch: int = 256
) -> tuple[Plan, list[Problem]]:
    """A plan with the estimates' tiles, and of what it is asked some measured, in microseconds."""
    shapes, tiles = ((batch, 3, 224, 224),), Tiles(HOPPER)
    make_plan(graph_of(name), shapes, "fp16", tiles)
    asked = tiles.asked()
    table = Table(MACHINE)
    for problem in asked:
        if (microseconds := time(problem)) is not None:
            tile = dict(vars(tiles.best(problem).tile))
            table.entries[problem.key] = Entry(tile, microseconds)
    return make_plan(graph_of(name), shapes, "fp16", Tiles(HOPPER, [table])), asked


def unknown(problem: Problem) -> None:
    return None


HALVES: dict[str, Callable[[Problem], bool]] = {
    "chains": lambda p: p.kind == "chain",
    "boxes": lambda p: p.kind == "boxes",
    "merged projections": lambda p: p.projection is not None,
    "all but merged projections": lambda p: p.kind == "boxes" and p.projection is None,
    "pointers": lambda p: p.kind == "pointers",
    "stems": lambda p: p.kind in ("stem and pool", "folded stem"),
    "pools": lambda p: p.kind == "max pool",
    "3x3": lambda p: getattr(p.shape, "r", 0) == 3,
}


@pytest.mark.parametrize("time", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("batch", [1, 256])
def test_half_a_table_changes_no_form(
    half: Callable[[Problem], bool], time: float, batch: int
) -> None:
    """The tiles measured are those of the estimates, so nothing else is left to change, either."""
    usual, _ = plan_of(unknown, batch=batch)
    plan, asked = plan_of(lambda problem: time if half(problem) else None, batch=batch)
    assert any(map(half, asked)) and plan.steps == usual.steps
    assert plan.dependent == usual.dependent
    measured = [c for c in plan.choices if c.measured and c.problem]
    assert len(measured) > 0 or not any(half(p) for p in asked if p.key in keys(plan))
    for before, after in zip(usual.choices, plan.choices, strict=True):
        assert after.estimated == before.estimated > 0


def keys(plan: Plan) -> set[str]:
    return {choice.problem for choice in plan.choices}


def test_groups_of_which_one_number_was_measured() -> None:
    usual, _ = plan_of(unknown, "resnext50_32x4d")
    for merged in (1, 8):
        for time in (SHORT, LONG):
            plan, asked = plan_of(
                lambda p, merged=merged, time=time: time if p.merged == merged else None,  # type: ignore[misc]
                "resnext50_32x4d",
            )
            assert plan.steps == usual.steps
    grouped = [p for p in asked if getattr(p.shape, "groups", 1) > 1]
    assert grouped
    plan, _ = plan_of(lambda p: 1.0 if p.merged == 2 else 9.0, "resnext50_32x4d")
    merged_by = {s.merged for s in plan.steps if isinstance(s, LaunchConv2d) and s.groups == 32}
    assert merged_by == {2}


def test_a_whole_table_decides() -> None:
    def slow(*kinds: str) -> Callable[[Problem], float]:
        return lambda problem: LONG if problem.kind in kinds else 1.0

    apart, _ = plan_of(slow("chain", "stem and pool"))
    assert not any(isinstance(step, LaunchChain | LaunchStemPool) for step in apart.steps)
    assert any(isinstance(step, LaunchBoxConv2d) and step.projection for step in apart.steps)
    pointers, _ = plan_of(slow("chain", "boxes", "stem and pool", "folded stem"))
    assert sum(isinstance(step, LaunchConv2d) for step in pointers.steps) == 53
    chained, _ = plan_of(slow("boxes", "pointers"))
    assert sum(isinstance(step, LaunchChain) for step in chained.steps) == 7
    single, _ = plan_of(lambda p: LONG if p.projection or p.kind == "chain" else 1.0)
    assert not any(isinstance(s, LaunchBoxConv2d) and s.projection for s in single.steps)
    for plan in (apart, pointers, chained, single):
        assert all(choice.measured for choice in plan.choices if choice.nodes)


def test_a_chain_that_leaves_the_next_1x1_is_told_by_its_own_time() -> None:
    """So that the sum over all choices counts nothing twice."""
    plan, _ = plan_of(unknown)
    steps = {step.node: step for step in plan.steps}
    shorter = 0
    for choice in plan.choices:
        step = steps.get(choice.nodes[-2]) if len(choice.nodes) > 1 else None
        if isinstance(step, LaunchChain) and step.next_target is None:
            shorter += 1
            (whole,) = (t for o, t in choice.others.items() if o.endswith("and that by itself"))
            (rest,) = (c for c in plan.choices if c.nodes == choice.nodes[-1:])
            both = choice.microseconds + rest.microseconds
            assert float(whole.split()[0]) == pytest.approx(both, abs=0.06)
    assert shorter


def form(kind: Any, seconds: float, estimate: float | None = None) -> Form:
    measured = estimate is not None
    return Form(kind, None, seconds, seconds if estimate is None else estimate, measured)


def test_sums_are_of_one_making() -> None:
    known, guessed = form("boxes", 5.0, 1.0), form("chain", 2.0)
    assert several([known, known]) == form("kernels of their own", 10.0, 2.0)
    assert several([known, guessed]) == form("kernels of their own", 3.0)
    slow, quick = Way(form("boxes", 5.0, 1.0)), Way(form("chain", 3.0, 2.0))
    assert quickest([slow, quick]) is preferred([slow, quick]) is quick
    guess = Way(guessed)
    assert quickest([guess, slow]) is slow  # by estimates of both
    assert preferred([guess, slow]) is guess and preferred([slow, guess]) is slow
    left = Way(form("boxes", 5.0, 1.0), (guessed,), "and a pool")
    assert instead([left, quick], quick) == {"boxes and a pool": f"{3e6:.1f} us estimated"}
    assert instead([left, quick], left).keys() == {"boxes and a pool", "chain"}


def test_choices_written_before_estimates_were_kept_are_read() -> None:
    plan, _ = plan_of(unknown)
    fields = msgspec.to_builtins(plan)
    for choice in fields["choices"]:
        del choice["estimated"]
    old = Plan.from_json(msgspec.json.encode(fields))
    assert old.steps == plan.steps and old.choices[0].estimated == 0
    shapes = ((256, 3, 224, 224),)
    assert make_plan(graph_of("resnet50"), shapes, "fp16", Tiles(HOPPER), old) is old
