"""Contexts of a plan: recorded once, replayed, one caller each; batches smaller than the plan's."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from msgspec import structs

import fastres
from fastres.backends.triton.backend import TritonExecutable, bucket
from fastres.backends.triton.lower import make_plan
from fastres.backends.triton.pack import Packed
from fastres.backends.triton.run import PlanRunner
from fastres.backends.triton.table import Tiles
from fastres.errors import OutOfMemory
from fastres.graph.architecture import ResNetSpec
from fastres.graph.builder import build_graph
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.kernels.cost import Target

CPU = torch.device("cpu")
interpreted = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
    ),
]


def small_graph() -> Graph:
    net = fastres.models.cifar_resnet(8, seed=0)
    return optimise(build_graph(net.state_dict(), ResNetSpec(), fastres.Input((1, 3, 8, 8))))


def runner_of(batch: int, record: Callable[..., Callable[[], None]] | None = None) -> PlanRunner:
    graph = small_graph()
    plan = make_plan(graph, ((batch, 3, 8, 8),), "fp32", Tiles(Target(90, 1)))
    return PlanRunner(plan, Packed(graph, torch.float32, CPU), CPU, record)


@pytest.mark.parametrize(
    ("batch", "planned"), [(1, 1), (16, 16), (17, 18), (33, 36), (100, 104), (255, 256)]
)
def test_bucket(batch: int, planned: int) -> None:
    assert bucket(batch) == planned


def test_buckets_waste_at_most_an_eighth_and_are_few() -> None:
    batches = range(1, 1025)
    assert all(b <= bucket(b) <= 1.125 * b for b in batches)
    assert len({bucket(b) for b in batches}) == 16 + 6 * 8


def test_no_room_says_how_much_was_asked_for() -> None:
    runner = runner_of(1)
    runner.plan = structs.replace(runner.plan, arena_bytes=2**60)
    with pytest.raises(OutOfMemory, match=r"1099511627776 MiB .* \[1, 3, 8, 8\].*smaller batches"):
        runner.run([torch.zeros(1, 3, 8, 8)])
    runner.plan = structs.replace(runner.plan, arena_bytes=2**20)
    with runner.context() as context:  # the next one that fits is served
        assert context.arena.numel() == 2**20


class TestInterpreted:
    pytestmark = interpreted

    def test_recorded_once_and_replayed(self) -> None:
        recorded, replayed = [], []

        def record(work: Callable[[], None]) -> Callable[[], None]:
            recorded.append(work)

            def replay() -> None:
                replayed.append(work)
                work()

            return replay

        runner, plain = runner_of(2, record), runner_of(2)
        x = torch.randn(2, 3, 8, 8)
        first, second = runner.run([x]), runner.run([x])
        assert len(recorded) == 1 and len(replayed) == 2
        assert torch.equal(first[0], second[0]) and torch.equal(first[0], plain.run([x])[0])

    def test_a_smaller_batch_uses_the_plan_of_its_bucket(self) -> None:
        runner = runner_of(3)
        x = torch.randn(3, 3, 8, 8)
        with runner.context() as context:
            context.arena.fill_(0xFF)
        whole = runner.run([x])[0]
        with runner.context() as context:
            context.arena.fill_(0xFF)
        part = runner.run([x[:2]])[0]
        assert part.shape[0] == 2 and torch.equal(part, whole[:2])

    def test_two_callers_get_two_arenas(self) -> None:
        runner = runner_of(1)
        with runner.context() as one, runner.context() as other:
            assert one is not other
            assert one.arena.data_ptr() != other.arena.data_ptr()
        with runner.context() as again:
            assert again in (one, other)

    def test_executable_plans_by_bucket(self) -> None:
        options = replace(fastres.options.Options(), precision="fp32")
        executable = TritonExecutable(small_graph(), options, CPU, ((17, 3, 8, 8),))
        assert executable._runner(((17, 3, 8, 8),)) is executable._runner(((18, 3, 8, 8),))
