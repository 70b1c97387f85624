"""The stem over folded pictures, in plans: taken where measurements say so, and equal."""

from __future__ import annotations

import os

import pytest
import torch

import fastres
from fastres.backends.triton.lower import make_plan
from fastres.backends.triton.pack import Packed
from fastres.backends.triton.plan import LaunchConv2d, LaunchStem, LoadInput
from fastres.backends.triton.problems import Problem
from fastres.backends.triton.regions import stems
from fastres.backends.triton.run import PlanRunner
from fastres.backends.triton.table import Entry, Machine, Table, Tiles
from fastres.errors import ArtifactError
from fastres.graph.architecture import ResNetSpec
from fastres.graph.builder import build_graph
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.kernels.cost import Target
from fastres.kernels.stem import stem_shape
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
    problem = Problem("pointers", stem_shape(n, p, q, 16), precision)  # type: ignore[arg-type]
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
