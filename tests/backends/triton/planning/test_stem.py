"""The stem over folded pictures, in plans: taken until measurements say otherwise; and equal."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import fastres
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.plan import (
    LaunchConv2d,
    LaunchStem,
    LaunchStemPool,
    LoadInput,
)
from fastres.backends.triton.planning.problems import Problem
from fastres.backends.triton.planning.regions import stems
from fastres.backends.triton.planning.table import Entry, Machine, Table, Tiles
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.running.run import PlanRunner
from fastres.backends.triton.shipping.cross import launches_of
from fastres.errors import ArtifactError
from fastres.graph.architecture import ResNetSpec
from fastres.graph.builder import build_graph
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.kernels.aot import compile_launch, narrow_loads
from fastres.kernels.cost import Target
from fastres.kernels.folding import stem_shape
from fastres.kernels.geometry import ConvShape, PoolShape
from fastres.kernels.tiles import ConvTile, StemPoolTile

CPU = torch.device("cpu")
SHAPE = (2, 3, 40, 40)
TILE = ConvTile(64, 16, 16, 4, 3)
TARGET = Target(90, 1)


def graph_of(size: int = 40) -> Graph:
    net = fastres.models.ResNet(
        fastres.models.Bottleneck, (1, 1, 1, 1), version="v1.5", num_classes=7, planes=16, seed=0
    )
    net = fastres.models.settle(net, torch.randn(8, 3, 40, 40))
    image = fastres.Input((1, 3, size, size))
    return optimise(build_graph(net.state_dict(), ResNetSpec(version="v1.5"), image))


def problems(n: int, p: int, q: int, precision: str) -> dict[str, Problem]:
    """What the stem of `graph_of` asks of kernels, and its max pool."""
    folded = stem_shape(n, p, q, 16)
    plain = ConvShape(n, 2 * p, 2 * q, 3, 16, 7, 7, (2, 2), (3, 3))
    pool = PoolShape(n, p, q, 16, (3, 3), (2, 2), (1, 1))
    shapes = {"folded stem": folded, "stem and pool": folded, "pointers": plain, "max pool": pool}
    return {kind: Problem(kind, shape, precision) for kind, shape in shapes.items()}  # type: ignore[arg-type]


def measured(n: int, p: int, q: int, precision: str = "fp32", **times: float) -> Tiles:
    """A table of what these were measured to take, by kind; without times, a fast folded stem."""
    asked, entries = problems(n, p, q, precision), {}
    for name, microseconds in (times or {"folded_stem": 1.0, "pointers": 9.0}).items():
        problem = asked[name.replace("_", " ")]
        tile = TILE if problem.kind == "folded stem" else problem.candidates(TARGET)[0]
        entries[problem.key] = Entry(dict(vars(tile)), microseconds)
    return Tiles(TARGET, [Table(Machine("a GPU", 1, "", ""), entries)])


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


@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("version", ["v1", "v1.5"])
def test_resnet50_pools_with_its_stem_until_that_is_measured(
    version: Any, batch: int, sm: int
) -> None:
    """Whatever the estimates say: none of them sees that plain pixels load 2 bytes at a time."""
    weights = fastres.models.resnet50(version=version, seed=0).state_dict()
    graph = optimise(fastres.build(weights, version=version))
    for precision in ("fp16", "bf16"):
        tiles = Tiles(Target.typical(sm))
        plan = make_plan(graph, ((batch, 3, 224, 224),), precision, tiles)  # type: ignore[arg-type]
        load, stem, *_ = plan.steps
        assert isinstance(stem, LaunchStemPool) and isinstance(load, LoadInput) and load.folded
        assert "conv1" not in plan.places
        (choice,) = (c for c in plan.choices if "conv1" in c.nodes)
        assert [other.split(" ")[0] for other in choice.others] == ["folded", "pointers"]
        kinds = {problem.kind for problem in tiles.asked()}  # all of which tuning measures
        assert {"stem and pool", "folded stem", "pointers", "max pool"} <= kinds
    narrow = make_plan(graph, ((batch, 3, 224, 224),), "tf32", Tiles(Target.typical(sm)))
    assert isinstance(narrow.steps[1], LaunchStem)  # four bytes an element are not pooled


@pytest.mark.parametrize("known", range(15), ids=lambda mask: f"{mask:04b}")
@pytest.mark.parametrize("time", [1e-3, 1e6], ids=["short", "long"])
def test_half_measured_stems_keep_their_order(known: int, time: float) -> None:
    """A measured time, short or long, is not compared with an estimate."""
    names = ("stem_and_pool", "folded_stem", "pointers", "max_pool")
    times = {name: time for i, name in enumerate(names) if known >> i & 1}
    tiles = measured(2, 20, 20, "fp16", **times) if times else Tiles(TARGET)
    plan = make_plan(graph_of(), (SHAPE,), "fp16", tiles)
    assert isinstance(plan.steps[1], LaunchStemPool)


@pytest.mark.parametrize(
    ("times", "kind"),
    [
        ((5, 3, 4, 3), LaunchStemPool),
        ((5, 3, 4, 1), LaunchStem),
        ((5, 4, 3, 1), LaunchConv2d),
        ((9, 9, 3, 7), LaunchStemPool),
    ],
)
def test_where_all_is_measured_the_quickest_is_taken(times: Any, kind: type) -> None:
    """The pool counts with the stems that leave it to another kernel."""
    names = ("stem_and_pool", "folded_stem", "pointers", "max_pool")
    tiles = measured(2, 20, 20, "fp16", **dict(zip(names, times, strict=True)))
    plan = make_plan(graph_of(), (SHAPE,), "fp16", tiles)
    assert isinstance(plan.steps[1], kind)
    (choice,) = (c for c in plan.choices if "conv1" in c.nodes)
    own = (LaunchStemPool, LaunchStem, LaunchConv2d).index(kind)
    assert choice.measured and choice.microseconds == pytest.approx(times[own])
    assert all("measured" in text for text in choice.others.values() if " us " in text)


@pytest.mark.parametrize("known", [(), ("pointers",), ("folded_stem",)])
def test_without_tensor_cores_the_estimates_of_both_decide(known: tuple[str, ...]) -> None:
    """Folding multiplies 256 by what 147 would do; nothing is pooled in fp32."""
    tiles = measured(2, 20, 20, **dict.fromkeys(known, 1e-3)) if known else Tiles(TARGET)
    plan = make_plan(graph_of(), (SHAPE,), "fp32", tiles)
    assert isinstance(plan.steps[1], LaunchConv2d) and plan.places["x"].shape[-1] == 3


@pytest.mark.parametrize("tiles", [Tiles(TARGET), measured(2, 20, 20)], ids=["by", "with"])
def test_odd_pictures_run_over_pointers(tiles: Tiles) -> None:
    plan = make_plan(graph_of(39), ((2, 3, 39, 39),), "fp16", tiles)
    assert isinstance(plan.steps[1], LaunchConv2d) and plan.places["x"].shape[-1] == 3
    (choice,) = (c for c in plan.choices if "conv1" in c.nodes)
    assert "expected even numbers" in choice.others["folded stem"]
    assert "expected even numbers" in choice.others["stem and pool"]


def test_a_stored_plan_keeps_its_stem() -> None:
    graph = graph_of()
    plan = make_plan(graph, (SHAPE,), "fp32", measured(2, 20, 20))
    assert make_plan(graph, (SHAPE,), "fp32", Tiles(TARGET), plan) is plan
    other = graph_of(39)
    with pytest.raises(ArtifactError, match="for conv1 that it cannot have"):
        make_plan(other, ((2, 3, 39, 39),), "fp32", Tiles(TARGET), plan)


APART = {"stem_and_pool": 9.0, "folded_stem": 2.0, "pointers": 1.0, "max_pool": 1.0}


def test_the_pool_goes_with_the_stem() -> None:
    graph = graph_of()
    plan = make_plan(graph, (SHAPE,), "fp16", Tiles(TARGET))
    assert isinstance(plan.steps[1], LaunchStemPool)
    assert plan.steps[1].node == "maxpool" and "conv1" not in plan.places
    choice = next(choice for choice in plan.choices if "maxpool" in choice.nodes)
    assert choice.nodes == ("conv1", "maxpool") and choice.taken.startswith("stem and pool ")
    assert make_plan(graph, (SHAPE,), "fp16", Tiles(TARGET), plan) is plan
    for precision, size in (("fp32", 40), ("fp16", 39)):  # refused in words by the kernel
        shape = (2, 3, size, size)
        odd = make_plan(graph_of(size), (shape,), precision, Tiles(TARGET))  # type: ignore[arg-type]
        assert not any(isinstance(step, LaunchStemPool) for step in odd.steps)
    with pytest.raises(ArtifactError, match="for maxpool that it cannot have"):
        make_plan(graph_of(39), ((2, 3, 39, 39),), "fp16", Tiles(TARGET), plan)


def test_a_measured_tile_is_taken() -> None:
    problem = Problem("stem and pool", stem_shape(2, 20, 20, 16), "fp16")
    tile = StemPoolTile(4, 16, 16, 4, 3)
    table = Table(Machine("a GPU", 1, "", ""), {problem.key: Entry(dict(vars(tile)), 0.001)})
    plan = make_plan(graph_of(), (SHAPE,), "fp16", Tiles(TARGET, [table]))
    stem = plan.steps[1]
    assert isinstance(stem, LaunchStemPool) and stem.tile == tile
    assert next(c for c in plan.choices if "maxpool" in c.nodes).measured


@pytest.mark.interpret
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_equal_to_a_stem_and_a_pool() -> None:
    graph = graph_of()
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    packed, results = Packed(graph, torch.float16, CPU), []
    for tiles in (Tiles(TARGET), measured(2, 20, 20, "fp16", **APART)):
        plan = make_plan(graph, (SHAPE,), "fp16", tiles)
        assert isinstance(plan.steps[1], LaunchStemPool) == (not results)
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
    for tiles in (Tiles(TARGET), measured(2, 20, 20)):
        runner = PlanRunner(make_plan(graph, (SHAPE,), "fp32", tiles), packed, CPU)
        with runner.context() as context:
            context.arena.fill_(0xFF)
        results.append(runner.run([x])[0])
        part = runner.run([x[:1]])[0]  # the second image is what the first call left
        assert torch.allclose(part, results[-1][:1], atol=1e-5)
    assert torch.allclose(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.compile
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles")
@pytest.mark.parametrize("batch", [1, 256])
def test_resnet50_reads_its_picture_16_bytes_at_a_time(batch: int) -> None:
    """Over plain pixels of three channels a stem loads them one by one."""
    weights = fastres.models.resnet50(seed=0).state_dict()
    graph = optimise(fastres.build(weights, version="v1.5"))
    target = Target.typical(90)
    packed = Packed(graph, torch.float16, torch.device("meta"))

    def narrow(tiles: Tiles) -> int:
        plan = make_plan(graph, ((batch, 3, 224, 224),), "fp16", tiles)
        stem = plan.steps[1].node
        (launch,) = (x for node, x in launches_of(plan, packed, target) if node == stem)
        facts = compile_launch(launch, 90)
        assert facts.spill_stores == 0
        return narrow_loads(launch, facts)

    assert narrow(Tiles(target)) == 0
    plain = Tiles(target)
    make_plan(graph, ((batch, 3, 224, 224),), "fp16", plain)
    for problem in plain.asked():
        if problem.kind in ("stem and pool", "folded stem"):
            for tile in problem.candidates(target):
                plain.ban(problem.key, tile, "not wanted")
    assert narrow(plain) > 20
