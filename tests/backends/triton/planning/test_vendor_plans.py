"""Where a plan has steps that PyTorch runs: measured to be faster, here, and nowhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from msgspec.structs import replace

import fastres
from fastres.backends.base import CompiledParts
from fastres.backends.triton.backend import TritonExecutable
from fastres.backends.triton.planning.bounds import step_bounds
from fastres.backends.triton.planning.form import SEVERAL
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.plan import LaunchChain, LaunchVendor, Plan
from fastres.backends.triton.planning.problems import Problem
from fastres.backends.triton.planning.table import Entry, Machine, Table, Tiles
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.shipping.cross import build, launches_of
from fastres.backends.triton.shipping.stored import recorded, write_plans
from fastres.backends.triton.tuning import choosing
from fastres.errors import ArtifactError
from fastres.graph.capture import capture
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.kernels.cost import Target
from fastres.options import Options, Precision

HOPPER, AMPERE = Target.typical(90), Target.typical(80)
HERE = "cuDNN 91900 of PyTorch 2.11.0 on NVIDIA H200"
ELSEWHERE = "cuDNN 92400 of PyTorch 2.14.1 on NVIDIA H200"
MACHINE = Machine("NVIDIA H200", 132, "3.6.0", "0123")
SHAPE = (2, 3, 16, 16)
Time = Callable[[Problem], float | None]


@cache
def graph_of() -> Graph:
    weights = fastres.models.resnet50(seed=0).state_dict()
    return optimise(fastres.build(weights, version="v1.5"))


@cache
def small(shortcut: Literal["A", "B"] = "B") -> Graph:
    net = fastres.models.cifar_resnet(8, shortcut=shortcut, seed=0)
    return optimise(fastres.build(net.state_dict(), inputs=fastres.Input(SHAPE)))


def tiles_of(
    time: Time,
    graph: Graph,
    shape: tuple[int, ...],
    target: Target = HOPPER,
    precision: Precision = "fp16",
) -> Tiles:
    """With the estimates' tiles, of which some were measured; in microseconds."""
    tiles, table = Tiles(target, (), HERE), Table(MACHINE)
    make_plan(graph, (shape,), precision, tiles)
    for asked in tiles.asked():
        if (microseconds := time(asked)) is not None:
            table.entries[asked.key] = Entry(dict(vars(tiles.best(asked).tile)), microseconds)
    return Tiles(target, [table], HERE)


def plan_of(time: Time, known: str | None = HERE, **more: Any) -> Plan:
    graph, shape = graph_of(), (32, 3, 224, 224)
    tiles = tiles_of(time, graph, shape, **more)
    tiles.library = known
    return make_plan(graph, (shape,), more.get("precision", "fp16"), tiles)


def theirs(plan: Plan) -> list[LaunchVendor]:
    return [step for step in plan.steps if isinstance(step, LaunchVendor)]


def vendor(us: float | None, ours: float | None, chains: float | None = 1e6) -> Time:
    def time(problem: Problem) -> float | None:
        kinds = {"vendor": us, "chain": chains}
        return kinds.get(problem.kind, ours)

    return time


class TestTaken:
    @pytest.mark.parametrize("target", [HOPPER, AMPERE], ids=["sm_90", "sm_80"])
    def test_where_it_was_measured_to_be_faster(self, target: Target) -> None:
        plan = plan_of(vendor(5.0, 9.0), target=target)
        steps = theirs(plan)
        merged = 16 if target is AMPERE else 12  # last 1x1s; on sm_90 four add a projection
        assert len(steps) == 32 + merged and {step.tile.library for step in steps} == {HERE}
        assert sum(step.residual is not None for step in steps) == merged
        choices = {choice.nodes: choice for choice in plan.choices}
        for step in steps:
            choice = choices[(step.node,)]
            assert choice.taken == f"vendor {HERE}" and choice.microseconds == 5.0
            assert choice.measured and choice.problem.endswith(f"by {HERE}")
            assert "9.0 us measured" in choice.others.values() and choice.estimated < 1e6
            place = plan.places[step.target]
            assert place.outside and place.shape[3] == graph_of()[step.node].spec.shape[1]
        assert not any(
            p.outside for n, p in plan.places.items() if n not in {s.node for s in steps}
        )

    def test_where_it_is_slower_ours_runs_and_its_time_is_told(self) -> None:
        plan = plan_of(vendor(9.5, 9.0))
        assert not theirs(plan)
        told = [c.others[f"vendor {HERE}"] for c in plan.choices if f"vendor {HERE}" in c.others]
        assert len(told) > 40 and set(told) == {"9.5 us measured"}

    @pytest.mark.parametrize(
        ("us", "ours"), [(None, 1e6), (None, None), (1e-3, None)], ids=["theirs", "both", "ours"]
    )
    def test_never_where_one_of_both_was_not_measured(
        self, us: float | None, ours: float | None
    ) -> None:
        plan = plan_of(vendor(us, ours))
        assert not theirs(plan)
        if us is None:
            told = [c.others["vendor"] for c in plan.choices if "vendor" in c.others]
            assert "not measured; tune=True does so" in told

    @pytest.mark.parametrize("known", [None, ELSEWHERE])
    def test_not_by_another_library_or_on_another_gpu(self, known: str | None) -> None:
        """None is what builds for another machine know."""
        plan = plan_of(vendor(1e-3, 9.0), known)
        assert not theirs(plan) and plan.libraries == set()

    def test_the_memory_of_the_arena_is_for_the_others(self) -> None:
        ours, mixed = plan_of(vendor(9.5, 9.0)), plan_of(vendor(5.0, 9.0))
        assert mixed.arena_bytes < ours.arena_bytes

    def test_what_estimates_decide_is_decided_as_if_ours_ran(self) -> None:
        """Chains that were not measured are compared with estimates of ours: it has none."""

        def chains(plan: Plan) -> list[str]:
            return [step.node for step in plan.steps if isinstance(step, LaunchChain)]

        usual = plan_of(vendor(None, 9.0, chains=None))
        assert chains(usual)
        for us in (1e-3, 1e6):
            plan = plan_of(vendor(us, 9.0, chains=None))
            assert chains(plan) == chains(usual) and plan.dependent == usual.dependent
        assert theirs(plan_of(vendor(1e-3, 9.0, chains=None)))

    def test_a_whole_table_weighs_regions_with_it(self) -> None:
        """A chain that beats our kernels may lose to the vendor's."""
        times = {"chain": 20.0}
        for us, expected in ((9.0, 7), (1.0, 0)):
            plan = plan_of(lambda p, us=us: {**times, "vendor": us}.get(p.kind, 9.0))  # type: ignore[misc]
            assert sum(isinstance(step, LaunchChain) for step in plan.steps) == expected
        assert all(choice.measured for choice in plan.choices if choice.taken == SEVERAL)

    @pytest.mark.parametrize("precision", ["fp32", "tf32"])
    def test_not_in_fp32(self, precision: Precision) -> None:
        """TF32 or not is a setting of the process there, and nothing rounds what it stores."""
        plan = plan_of(vendor(1e-3, 9.0), precision=precision)
        (reason,) = {c.others["vendor"] for c in plan.choices if "vendor" in c.others}
        assert not theirs(plan) and reason.startswith(f"{precision} is not asked of PyTorch")

    def test_bounds_are_told(self) -> None:
        plan = plan_of(vendor(5.0, 9.0))
        found = {bound.node: bound for bound in step_bounds(plan, graph_of(), HOPPER)}
        for step in theirs(plan):
            bound = found[step.node]
            assert bound.form == f"vendor {HERE}" and bound.arithmetic > 0 and bound.memory > 0


class Odd(torch.nn.Module):
    """What PyTorch has no one launch for, each with a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        conv = torch.nn.Conv2d
        self.silu, self.plain, self.bare = (
            conv(16, 16, 1),
            conv(16, 16, 1),
            conv(16, 16, 1, bias=False),
        )
        self.well, self.last = conv(16, 16, 3, 1, 1, groups=2), conv(16, 16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.plain(torch.nn.functional.silu(self.silu(x)))
        y = self.well(self.bare(y).relu()).relu()
        return self.last(y).relu().flatten(1)


def test_what_it_does_not_take() -> None:
    shape = (2, 16, 8, 8)
    graph = optimise(capture(Odd().eval(), [fastres.Input(shape)]).graph)
    tiles = tiles_of(vendor(1.0, 9.0), graph, shape)
    plan = make_plan(graph, (shape,), "fp16", tiles)
    assert [(step.node, step.groups) for step in theirs(plan)] == [("well", 2)]
    reasons = {choice.nodes[0]: choice.others.get("vendor", "") for choice in plan.choices[:5]}
    assert reasons["silu"] == reasons["plain"] == "PyTorch fuses a ReLU only"
    assert "a bias of zeros" in reasons["bare"] and "caller gets" in reasons["last"]


def test_shortcut_a_is_not_taken() -> None:
    plan = make_plan(small("A"), (SHAPE,), "fp16", tiles_of(vendor(1.0, 9.0), small("A"), SHAPE))
    reasons = [c.others["vendor"] for c in plan.choices if "vendor" in c.others]
    assert sum("shortcut A" in reason for reason in reasons) == 2 and theirs(plan)


class TestStored:
    @pytest.fixture
    def plan(self) -> Plan:
        return make_plan(small(), (SHAPE,), "fp16", tiles_of(vendor(5.0, 9.0), small(), SHAPE))

    def test_a_plan_comes_back_where_the_library_is_the_same(self, plan: Plan) -> None:
        files = write_plans("sm_90", [plan], ())
        assert recorded(files, "sm_90", HERE) == {(SHAPE,): plan}
        bare = Tiles(HOPPER, (), HERE)  # nothing measured: the plan says so itself
        assert make_plan(small(), (SHAPE,), "fp16", bare, plan) is plan
        for other in (None, ELSEWHERE):
            assert recorded(files, "sm_90", other) == {}
            with pytest.raises(ArtifactError, match="that it cannot have"):
                make_plan(small(), (SHAPE,), "fp16", Tiles(HOPPER, (), other), plan)
        ours = make_plan(small(), (SHAPE,), "fp16", Tiles(HOPPER))
        both = write_plans("sm_90", [ours, replace(plan, input_shapes=())], ())
        assert recorded(both, "sm_90") == {(SHAPE,): ours}

    def test_a_step_that_does_not_follow_is_refused(self, plan: Plan) -> None:
        first = theirs(plan)[0]
        steps = tuple(replace(s, stride=(2, 2)) if s is first else s for s in plan.steps)
        altered = replace(plan, steps=steps)
        with pytest.raises(ArtifactError, match="does not follow from the graph"):
            make_plan(small(), (SHAPE,), "fp16", Tiles(HOPPER, (), HERE), altered)

    @pytest.mark.parametrize("known", [HERE, ELSEWHERE, None])
    def test_an_engine_keeps_it_or_chooses_anew(
        self, plan: Plan, known: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tiles = Tiles(HOPPER, (), known)
        monkeypatch.setattr(choosing, "tiles_for", lambda options, device: tiles)
        parts = CompiledParts(write_plans("sm_90", [plan], ()))
        options, cpu = Options(precision="fp16"), torch.device("cpu")
        made = TritonExecutable(small(), options, cpu, (SHAPE,), parts)
        same = known == HERE
        assert bool(theirs(made._runners.latest().plan)) is same
        taken = [choice.taken for choice in made.account().choices]
        assert taken.count(f"vendor {HERE}") == (len(theirs(plan)) if same else 0)


class TestMachineCode:
    def test_has_no_such_step(self) -> None:
        plan = plan_of(vendor(5.0, 9.0))
        meta = Packed(graph_of(), torch.float16, torch.device("meta"))
        with pytest.raises(AssertionError, match="no launch of ours"):
            launches_of(plan, meta, HOPPER)

    @pytest.mark.compile
    def test_is_built_of_kernels_of_ours(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where the engine was tuned, and where the table that is shipped knows of it."""
        tiles = tiles_of(vendor(1e-3, 9.0), small(), SHAPE)
        stored = make_plan(small(), (SHAPE,), "fp16", tiles)
        assert theirs(stored)
        monkeypatch.setattr(
            "fastres.backends.triton.shipping.cross.shipped_for", lambda t: tiles._tables
        )
        options = Options(precision="fp16", target="sm_90")
        parts = CompiledParts(write_plans("sm_90", [stored], ()))
        made = build(small(), options, (SHAPE,), parts)
        assert not theirs(made.plan) and made.account().kernels
        assert not any("vendor" in choice.taken for choice in made.account().choices)


def test_tuning_asks_for_it_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu, asked = torch.device("cuda", 0), []
    monkeypatch.setattr(choosing, "this_machine", lambda device: MACHINE)
    monkeypatch.setattr(choosing, "target_of", lambda device: HOPPER)
    monkeypatch.setattr(choosing, "library", lambda device: HERE if device == gpu else None)

    def tune(problems: list[Problem], table: Table, *more: Any, **and_more: Any) -> None:
        asked.extend(problems)
        for problem in problems:
            tile = dict(vars(problem.candidates(HOPPER)[0]))
            table.entries[problem.key] = Entry(tile, 1.0 if problem.kind == "vendor" else 9.0)

    monkeypatch.setattr("fastres.backends.triton.tuning.tune.tune", tune)
    options = Options(precision="fp16", cache_dir=str(tmp_path))
    tiles = choosing.tuned(small(), options, gpu, (SHAPE,))
    assert {problem.library for problem in asked if problem.kind == "vendor"} == {HERE}
    assert tiles.library == choosing.tiles_for(options, gpu).library == HERE
    assert choosing.tiles_for(options, torch.device("cpu")).library is None
    assert theirs(make_plan(small(), (SHAPE,), "fp16", tiles))


def test_a_problem_is_of_one_library() -> None:
    """So what was measured with another one is measured anew, and stays for whoever has that."""
    (asked, *_) = (p for p in tiles_asked() if p.kind == "vendor")
    assert not any(p.kind == "vendor" for p in tiles_asked(None))
    other = dataclasses.replace(asked, library=ELSEWHERE)
    assert asked.key != other.key and asked.key.endswith(f"by {HERE}")
    (tile,) = asked.candidates(HOPPER)
    assert asked.takes(tile, HOPPER) and not other.takes(tile, HOPPER)


def tiles_asked(known: str | None = HERE) -> list[Problem]:
    tiles = Tiles(HOPPER, (), known)
    make_plan(graph_of(), ((32, 3, 224, 224),), "fp16", tiles)
    return tiles.asked()
