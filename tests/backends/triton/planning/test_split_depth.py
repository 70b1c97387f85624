"""Plans whose depth is split: who adds the parts, and the counters of the programs that do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.plan import LaunchBoxConv2d, Plan
from fastres.backends.triton.planning.problems import Problem
from fastres.backends.triton.planning.table import Tiles
from fastres.backends.triton.planning.tensors import COUNTERS
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.running.run import PlanRunner
from fastres.backends.triton.shipping.cross import launches_of
from fastres.backends.triton.tuning.tune import tiles_to_try
from fastres.graph.capture import capture
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.graph.specs import DTYPES
from fastres.kernels.cost import Target
from fastres.kernels.geometry import ConvShape
from fastres.kernels.tiles import BoxTile

HOPPER, META = Target.typical(90), torch.device("meta")
SHAPE = (1, 256, 7, 9)


@pytest.fixture(scope="module")
def resnet50() -> Graph:
    return optimise(fastres.build(fastres.models.resnet50(seed=0).state_dict(), version="v1.5"))


class Two(nn.Module):
    """Two convolutions of few pixels and much depth, the second with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(256, 128, 3, padding=1)
        self.b = nn.Conv2d(128, 256, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.b(self.a(x).relu()) + x).relu()


@pytest.fixture(scope="module")
def two() -> Graph:
    torch.manual_seed(0)
    return optimise(capture(Two().eval(), [fastres.Input(SHAPE)]).graph)


class WithTwoKernels(Tiles):
    """Tiles among which no last part's program adds."""

    def best(self, problem: Problem) -> Any:
        for tile in problem.candidates(self.target) if problem.kind == "boxes" else []:
            if isinstance(tile, BoxTile) and tile.last_adds:
                self.banned[problem.key, tile] = "for the test"
        return super().best(problem)


def split(plan: Plan) -> list[LaunchBoxConv2d]:
    return [s for s in plan.steps if isinstance(s, LaunchBoxConv2d) and s.tile.split_k > 1]


def launches(plan: Plan, graph: Graph) -> int:
    constants = Packed(graph, torch.float16, META)
    return len(list(launches_of(plan, constants, HOPPER)))


def test_one_image_takes_one_launch_a_step(resnet50: Graph) -> None:
    shapes = ((1, 3, 224, 224),)
    plan = make_plan(resnet50, shapes, "fp16", Tiles(HOPPER))
    assert len(plan.steps) == 46 and len(split(plan)) >= 17
    assert launches(plan, resnet50) == 45  # its input is brought in by one more
    before = make_plan(resnet50, shapes, "fp16", WithTwoKernels(HOPPER))
    assert len(before.steps) == 46 and launches(before, resnet50) == 62


def test_counters_are_shared_by_launches_and_by_no_value(resnet50: Graph) -> None:
    plan = make_plan(resnet50, ((1, 3, 224, 224),), "fp16", Tiles(HOPPER))
    assert {step.counters for step in split(plan)} == {COUNTERS}
    place = plan.places[COUNTERS]
    assert place.dtype == "int32" and 32 <= place.shape[0] <= 128
    end = place.offset + 4 * place.shape[0]
    for name, other in plan.places.items():
        size = torch.Size(other.shape).numel() * DTYPES[other.dtype].itemsize
        apart = other.offset >= end or other.offset + size <= place.offset
        assert apart or name == COUNTERS, name
    none = make_plan(resnet50, ((256, 3, 224, 224),), "fp16", Tiles(HOPPER))
    assert not split(none) and COUNTERS not in none.places


def test_a_plan_of_before_is_taken_as_it_is(two: Graph) -> None:
    """One that knows neither counters nor who adds: a second kernel does, over the same memory."""
    old = make_plan(two, (SHAPE,), "fp16", WithTwoKernels(HOPPER))
    assert len(split(old)) == 2 and COUNTERS not in old.places
    content = json.loads(old.to_json())
    for step in content["steps"]:
        step.pop("counters", None)
        step.get("tile", {}).pop("last_adds", None)
    assert "last_adds" not in json.dumps(content)
    read = Plan.from_json(json.dumps(content).encode())
    assert read == old
    assert make_plan(two, (SHAPE,), "fp16", Tiles(HOPPER), recorded=read) is read
    assert launches(read, two) == 4


@pytest.mark.interpret
class TestRuns:
    @pytest.fixture
    def runners(self, two: Graph) -> Iterator[tuple[PlanRunner, PlanRunner]]:
        """In which the last part's program adds, and in which a second kernel does."""
        packed, cpu = Packed(two, torch.float16, torch.device("cpu")), torch.device("cpu")
        tiles = Tiles(HOPPER), WithTwoKernels(HOPPER)
        ours, theirs = (make_plan(two, (SHAPE,), "fp16", each) for each in tiles)
        assert [step.tile.last_adds for step in split(ours)] == [True, True]
        yield PlanRunner(ours, packed, cpu), PlanRunner(theirs, packed, cpu)

    def test_the_same_bits_call_after_call(self, runners: tuple[PlanRunner, PlanRunner]) -> None:
        ours, theirs = runners
        for seed in range(3):
            x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
            with ours.context() as context:
                counters = context.tensors[COUNTERS]
                assert not counters.any()
                context.arena.fill_(0xFF)
                counters.zero_()
            assert torch.equal(ours.run([x])[0], theirs.run([x])[0])
            with ours.context() as context:
                assert not context.tensors[COUNTERS].any()

    def test_callers_at_once_have_counters_of_their_own(
        self, runners: tuple[PlanRunner, PlanRunner]
    ) -> None:
        ours, _ = runners
        with ours.context() as one, ours.context() as other:
            places = [context.tensors[COUNTERS].data_ptr() for context in (one, other)]
        assert places[0] != places[1]


@pytest.mark.parametrize(
    ("precision", "last_adds"), [("fp16", True), ("int8", True), ("tf32", False)]
)
def test_the_quicker_by_estimate_is_taken_and_both_are_tried(
    precision: Any, last_adds: bool
) -> None:
    """One SM's loads of all parts against a launch; of large tiles, as TF32's, the latter."""
    shape = ConvShape(1, 14, 14, 256, 256, 3, 3, (1, 1), (1, 1))
    problem = Problem("boxes", shape, precision)
    tiles = tiles_to_try(problem, HOPPER)
    first, second = tiles[:2]
    assert isinstance(first, BoxTile) and isinstance(second, BoxTile)
    assert first.split_k > 1 and first.last_adds == last_adds
    assert second.split_k > 1 and second.last_adds != last_adds
    every = problem.candidates(HOPPER)
    assert first == every[0]
    assert second == next(x for x in every if x.split_k > 1 and x.last_adds != last_adds)
    assert tiles[2:] == [tile for tile in every if tile not in (first, second)]
