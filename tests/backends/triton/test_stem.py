"""The stem over folded pictures, in plans: taken where measurements say so, and equal."""

from __future__ import annotations

import os

import pytest
import torch

import fastres
from fastres.backends.triton.lower import make_plan
from fastres.backends.triton.pack import Packed
from fastres.backends.triton.plan import LaunchConv2d, LaunchStem, LaunchStemPool, LoadInput
from fastres.backends.triton.problems import Problem
from fastres.backends.triton.regions import stems
from fastres.backends.triton.run import PlanRunner
from fastres.backends.triton.table import Entry, Machine, Table, Tiles
from fastres.errors import ArtifactError
from fastres.graph.architecture import ResNetSpec
from fastres.graph.builder import build_graph
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.kernels import stem_pool_tiles
from fastres.kernels.cost import Target
from fastres.kernels.folding import stem_shape
from fastres.kernels.stem_pool_tiles import StemPoolTile
from fastres.kernels.tiles import ConvTile

CPU = torch.device("cpu")
SHAPE = (2, 3, 40, 40)
TILE = ConvTile(64, 16, 16, 4, 3)


def graph_of(size: int = 40) -> Graph:
    net = fastres.models.ResNet(
        fastres.models.Bottleneck, (1, 1, 1, 1), version="v1.5", num_classes=7, planes=16, seed=0
    )
    net = fastres.models.settle(net, torch.randn(8, 3, 40, 40))
    image = fastres.Input((1, 3, size, size))
    return optimise(build_graph(net.state_dict(), ResNetSpec(version="v1.5"), image))


def measured(n: int, p: int, q: int, precision: str = "fp32") -> Tiles:
    """Tables in which the folded stem is by far the fastest."""
    problem = Problem("folded stem", stem_shape(n, p, q, 16), precision)  # type: ignore[arg-type]
    table = Table(Machine("a GPU", 1, "", ""), {problem.key: Entry(dict(vars(TILE)), 0.001)})
    return Tiles(Target(90, 1), [table])


def test_taken_where_it_was_measured_to_be_faster() -> None:
    graph = graph_of()
    assert [node.name for node in stems(graph).values()] == ["conv1"]
    plan = make_plan(graph, (SHAPE,), "fp32", measured(2, 20, 20))
    load, stem, *_ = plan.steps
    assert load == LoadInput("x", "x", "x", folded=True)
    assert isinstance(stem, LaunchStem) and stem.tile == TILE
    assert plan.places["x"].shape == (2, 23, 23, 16)
    choice = next(choice for choice in plan.choices if choice.nodes == ("conv1",))
    assert choice.taken.startswith("folded stem") and choice.measured
    assert any(other.startswith("pointers") for other in choice.others)


@pytest.mark.parametrize("tiles", [Tiles(Target(90, 1)), measured(2, 20, 20)], ids=["by", "with"])
def test_odd_pictures_and_slower_stems_run_over_pointers(tiles: Tiles) -> None:
    size = 40 if not tiles._tables else 39
    plan = make_plan(graph_of(size), ((2, 3, size, size),), "fp32", tiles)
    assert isinstance(plan.steps[1], LaunchConv2d) and plan.places["x"].shape[-1] == 3


def test_a_stored_plan_keeps_its_stem() -> None:
    graph = graph_of()
    plan = make_plan(graph, (SHAPE,), "fp32", measured(2, 20, 20))
    assert make_plan(graph, (SHAPE,), "fp32", Tiles(Target(90, 1)), plan) is plan
    other = graph_of(39)
    with pytest.raises(ArtifactError, match="for conv1 that it cannot have"):
        make_plan(other, ((2, 3, 39, 39),), "fp32", Tiles(Target(90, 1)), plan)


def reckoned(seconds: float, monkeypatch: pytest.MonkeyPatch) -> Tiles:
    """Estimates by which a stem and its pool take so long as one kernel."""
    monkeypatch.setattr(stem_pool_tiles, "stem_pool_seconds", lambda *sizes: seconds)
    return Tiles(Target(90, 1))


def test_the_pool_goes_with_the_stem_where_it_is_reckoned_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, tiles = graph_of(), reckoned(0.0, monkeypatch)
    plan = make_plan(graph, (SHAPE,), "fp16", tiles)
    assert isinstance(plan.steps[1], LaunchStemPool)
    assert plan.steps[1].node == "maxpool" and "conv1" not in plan.places
    choice = next(choice for choice in plan.choices if "maxpool" in choice.nodes)
    assert choice.nodes == ("conv1", "maxpool") and choice.taken.startswith("stem and pool ")
    assert make_plan(graph, (SHAPE,), "fp16", Tiles(Target(90, 1)), plan) is plan
    slow = make_plan(graph, (SHAPE,), "fp16", reckoned(1.0, monkeypatch))
    assert not isinstance(slow.steps[1], LaunchStemPool)
    tiles = reckoned(0.0, monkeypatch)
    for precision, size in (("fp32", 40), ("fp16", 39)):  # refused in words by the kernel
        odd = make_plan(graph_of(size), ((2, 3, size, size),), precision, tiles)  # type: ignore[arg-type]
        assert not any(isinstance(step, LaunchStemPool) for step in odd.steps)
    with pytest.raises(ArtifactError, match="for maxpool that it cannot have"):
        make_plan(graph_of(39), ((2, 3, 39, 39),), "fp16", tiles, plan)


def test_a_measured_tile_is_taken() -> None:
    problem = Problem("stem and pool", stem_shape(2, 20, 20, 16), "fp16")
    tile = StemPoolTile(4, 16, 16, 4, 3)
    table = Table(Machine("a GPU", 1, "", ""), {problem.key: Entry(dict(vars(tile)), 0.001)})
    plan = make_plan(graph_of(), (SHAPE,), "fp16", Tiles(Target(90, 1), [table]))
    stem = plan.steps[1]
    assert isinstance(stem, LaunchStemPool) and stem.tile == tile
    assert next(c for c in plan.choices if "maxpool" in c.nodes).measured


@pytest.mark.interpret
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_equal_to_a_stem_and_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of()
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    packed, results = Packed(graph, torch.float16, CPU), []
    for seconds in (0.0, 1.0):
        plan = make_plan(graph, (SHAPE,), "fp16", reckoned(seconds, monkeypatch))
        assert isinstance(plan.steps[1], LaunchStemPool) == (seconds == 0.0)
        runner = PlanRunner(plan, packed, CPU)
        with runner.context() as context:
            context.arena.fill_(0xFF)
        results.append(runner.run([x])[0].float())
    assert torch.allclose(*results, rtol=2e-2, atol=2e-2)
    assert (results[0] - results[1]).norm() < 3e-3 * results[1].norm()


@pytest.mark.interpret
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
def test_equal_to_the_convolution(dtype: torch.dtype, layout: str) -> None:
    graph = graph_of()
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    packed = Packed(graph, torch.float32, CPU)
    results = []
    for tiles in (Tiles(Target(90, 1)), measured(2, 20, 20)):
        runner = PlanRunner(make_plan(graph, (SHAPE,), "fp32", tiles), packed, CPU)
        with runner.context() as context:
            context.arena.fill_(0xFF)
        results.append(runner.run([x])[0])
        part = runner.run([x[:1]])[0]  # the second image is what the first call left
        assert torch.allclose(part, results[-1][:1], atol=1e-5)
    assert torch.allclose(*results, rtol=1e-4, atol=1e-4)
