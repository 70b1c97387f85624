"""What holds up each step: the work that was reckoned, read off a plan; and what is shown of it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import fastres
from fastres.backends.base import StepBound
from fastres.backends.triton.planning.bounds import _Reader, step_bounds
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.overlap import LAUNCH_US
from fastres.backends.triton.planning.plan import LaunchBoxConv2d, LaunchChain, LoadInput, Plan
from fastres.backends.triton.planning.table import Tiles
from fastres.engine.info import bound_table
from fastres.graph.cost import multiply_adds
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.graph.passes.quantise import eight_bits, quantise
from fastres.graph.shapes import infer_shapes
from fastres.kernels.cost import Target
from fastres.options import EIGHT_BITS
from fastres.quantization.calibrate import collect
from fastres.text import render_whole

HOPPER, AMPERE = Target.typical(90), Target.typical(80)


@cache
def graph_of(name: str, version: Any = "v1.5") -> Graph:
    more = {"version": version} if name == "resnet50" else {}
    weights = getattr(fastres.models, name)(seed=0, **more).state_dict()
    return optimise(fastres.build(weights, version=version))


def in_precision(graph: Graph, precision: Any) -> Graph:
    """By the ranges of one random picture: which kernels there are does not depend on them."""
    if precision not in EIGHT_BITS:
        return graph
    picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    table = collect(graph, [fastres.Input((1, 3, 64, 64))], [(picture,)], "minmax")
    return quantise(graph, table, "skip", eight_bits(precision))


def planned(graph: Graph, precision: Any, batch: int, target: Target) -> tuple[Plan, Tiles]:
    tiles = Tiles(target)
    return make_plan(graph, ((batch, 3, 224, 224),), precision, tiles), tiles


@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("precision", ["fp16", "tf32", "fp32", "int8"])
@pytest.mark.parametrize(
    ("name", "version", "target"),
    [
        ("resnet50", "v1.5", HOPPER),
        ("resnet50", "v1", HOPPER),
        ("resnet18", "v1.5", HOPPER),
        ("resnext50_32x4d", "v1.5", HOPPER),
        ("resnet50", "v1.5", AMPERE),
    ],
)
def test_steps_are_read_as_they_were_reckoned(
    name: str, version: Any, target: Target, precision: Any, batch: int
) -> None:
    """Each problem is one that was asked, and no estimate is below any of its bounds."""
    graph = in_precision(graph_of(name, version), precision)
    plan, tiles = planned(graph, precision, batch, target)
    shapes = {key: tuple(value.shape) for key, value in graph.constants.items()}
    reader, asked = _Reader(plan, shapes, target), set(tiles.asked())
    bounds = step_bounds(plan, graph, target)
    assert [bound.node for bound in bounds] == [step.node for step in plan.steps]
    products = 0
    for step, bound in zip(plan.steps, bounds, strict=True):
        problem = reader._problem(step)
        assert (problem is not None) == hasattr(step, "tile")
        longest = max(bound.arithmetic, bound.memory, bound.l2)
        assert getattr(bound, bound.bound) == max(longest, bound.launch)
        if problem is not None:
            products += 1
            assert problem in asked, step
            assert str(step.tile) in bound.form  # type: ignore[union-attr]
            seconds = problem.seconds(step.tile, target)  # type: ignore[union-attr]
            assert longest <= 1.000001e6 * seconds, step
    assert products > 17


@pytest.mark.parametrize("batch", [32, 256])
def test_all_products_are_counted(batch: int) -> None:
    """Tiles multiply no less than the network has, and of a large batch little more."""
    graph = graph_of("resnet50")
    plan, _ = planned(graph, "fp16", batch, HOPPER)
    shapes = infer_shapes(graph, [(batch, 3, 224, 224)])
    flops = 2 * sum(multiply_adds(node, shapes, graph) for node in graph)
    least = 1e6 * flops / (HOPPER.product_flops(2) * HOPPER.sm_count)
    found = sum(bound.arithmetic for bound in step_bounds(plan, graph, HOPPER))
    assert least < found < 1.1 * least


def test_l2_is_counted_in_every_form() -> None:
    """At batch 256 it takes more than twice the arithmetic: nine taps load their pixels anew."""
    graph = graph_of("resnet50")
    plan, _ = planned(graph, "fp16", 256, HOPPER)
    bounds = {bound.node: bound for bound in step_bounds(plan, graph, HOPPER)}
    total = sum(bound.l2 for bound in bounds.values())
    moved = total * 1e-6 * HOPPER.l2_bytes * HOPPER.sm_count
    assert 30e9 < moved < 37e9
    assert total > 2 * sum(bound.arithmetic for bound in bounds.values())
    for step in plan.steps:
        bound, pixels = bounds[step.node], plan.places[step.writes()[0]].shape
        if isinstance(step, LaunchChain | LaunchBoxConv2d) and pixels[1] <= 28:
            assert bound.bound == "l2", step
    # a chain's traffic by hand: taps, residual and weights in, out and the next 1x1's out
    (chain,) = (s for s in plan.steps if s.node == "layer1.1.conv3")
    assert isinstance(chain, LaunchChain) and chain.next_target
    boxes = 256 * 56 * 56 // chain.tile.pixels
    weights = 9 * 64 * 64 + 256 * 64 + 256 * 64
    moved = 2 * (256 * 56 * 56 * (9 * 64 + 256 + 256 + 64) + boxes * weights)
    assert bounds[chain.node].l2 == pytest.approx(1e6 * moved / (HOPPER.l2_bytes * 132))


def test_launches_hold_up_a_single_image_and_bytes_are_read_as_bytes() -> None:
    graph = graph_of("resnet50")
    plan, _ = planned(graph, "fp16", 1, HOPPER)
    bounds = {bound.node: bound for bound in step_bounds(plan, graph, HOPPER)}
    assert bounds["avgpool"].bound == "launch" and bounds["avgpool"].launch == LAUNCH_US
    split = [s for s in plan.steps if isinstance(s, LaunchBoxConv2d) and s.workspace]
    assert split and all(step.tile.last_adds for step in split)
    assert all(bounds[step.node].launch == LAUNCH_US for step in split)
    load = plan.steps[0]
    assert isinstance(load, LoadInput)
    written = 2 * 115 * 115 * 16  # of a folded picture, with its margin
    assert bounds["x"].memory == pytest.approx(1e6 * (written + 4 * 3 * 224**2) / HOPPER.dram_bytes)


def test_the_table_sums_up_what_is_held_up_by_what() -> None:
    steps = (
        StepBound("a", "boxes", "l2", 1.0, 2.0, 5.0, 1.0),
        StepBound("b", "boxes", "l2", 1.0, 2.0, 3.0, 1.0),
        StepBound("c", "LaunchMaxPool", "launch", 0.0, 0.25, 0.25, 1.0),
    )
    rows = [line.split() for line in render_whole(bound_table(steps)).splitlines()]
    cells = [[cell for cell in row if cell not in "│┃"] for row in rows]
    assert ["a", "boxes", "1.0", "2.0", "5.0", "1.0", "L2"] in cells
    assert ["2", "steps", "2.0", "4.0", "8.0", "2.0", "L2"] in cells
    assert ["1", "steps", "0.0", "0.2", "0.2", "1.0", "launch"] in cells
    (total,) = (row for row in cells if row[:2] == ["3", "steps"])
    assert total[-5:] == ["9.0", "2.0", "4.2", "8.2", "3.0"]
