"""From graph to plan: regions, memory, what is refused, and the plan as data."""

from __future__ import annotations

from collections import Counter
from copy import copy
from functools import cache
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.plan import (
    LaunchBoxConv2d,
    LaunchChain,
    LaunchConv2d,
    LaunchLinear,
    LaunchStem,
    LaunchStemPool,
    LoadInput,
    Plan,
)
from fastres.backends.triton.planning.problems import TILE_OF
from fastres.backends.triton.planning.refusals import refusals
from fastres.backends.triton.planning.regions import boundaries, projections, shortcuts
from fastres.backends.triton.planning.table import Tiles, shipped_for
from fastres.backends.triton.tuning.choosing import ban
from fastres.errors import ArtifactError
from fastres.graph.capture import capture
from fastres.graph.ir import Conv2d, Graph
from fastres.graph.passes.pipeline import optimise
from fastres.kernels.cost import Target

HOPPER, AMPERE = Tiles(Target.typical(90)), Tiles(Target.typical(80))


def graph_of(model: nn.Module, size: int = 32) -> Graph:
    return optimise(capture(model.eval(), [fastres.Input((2, 3, size, size))]).graph)


def test_one_launch_per_convolution_and_no_shortcut_node_runs() -> None:
    graph = graph_of(fastres.models.cifar_resnet(20, shortcut="A"))
    assert refusals(graph) == ()
    plan = make_plan(graph, ((4, 3, 32, 32),), "fp16", AMPERE)
    assert sum(isinstance(step, LaunchConv2d) for step in plan.steps) == 19
    assert len(plan.steps) == 19 + 3  # load, global pool, linear
    views = [s.shortcut for s in plan.steps if isinstance(s, LaunchConv2d) and s.shortcut]
    assert len(views) == 9
    assert [(v.stride, v.channel_offset) for v in views if v.stride > 1] == [(2, 8), (2, 16)]


def test_plan_survives_json() -> None:
    plan = make_plan(graph_of(fastres.models.cifar_resnet(20)), ((1, 3, 32, 32),), "tf32", HOPPER)
    assert plan.allow_tf32 and Plan.from_json(plan.to_json()) == plan
    with pytest.raises(msgspec.ValidationError, match="arena_bytes"):
        Plan.from_json(plan.to_json().replace(b'"arena_bytes":', b'"arena_bytes":"x","y":'))


def test_arena_is_far_smaller_than_all_values() -> None:
    graph = graph_of(fastres.models.resnet50(), 64)
    plan = make_plan(graph, ((8, 3, 64, 64),), "fp16", HOPPER)
    everything = sum(2 * torch.Size(place.shape).numel() for place in plan.places.values())
    assert plan.arena_bytes < everything / 5
    assert isinstance(plan.steps[0], LoadInput) and isinstance(plan.steps[-1], LaunchLinear)


def test_pooled_maps_are_flattened_without_a_launch() -> None:
    plan = make_plan(graph_of(fastres.models.cifar_resnet(20)), ((2, 3, 32, 32),), "fp32", HOPPER)
    assert plan.places["avgpool"].shape == (2, 1, 1, 64) and "flatten" not in plan.places
    assert plan.outputs == (("fc", (2, 10)),)


class Shared(nn.Module):
    """A strided, padded shortcut that somebody else reads as well: it has to be run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2))
        return self.conv(x) + shortcut, shortcut


def test_a_shortcut_with_another_reader_is_refused() -> None:
    graph = graph_of(Shared())
    assert shortcuts(graph) == {}
    refused = {refusal.node: refusal.reason for refusal in refusals(graph)}
    assert set(refused) == {"slice_1", "pad"} or len(refused) == 2
    assert all("triton has no kernel for" in reason for reason in refused.values())


class Odd(nn.Module):
    """Sums that are no residual: with broadcasting, and of rows; a softmax."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = nn.functional.adaptive_avg_pool2d(x, 1)
        return (x + pooled).relu(), nn.functional.softmax(pooled.flatten(1), 1)


def test_what_has_no_kernel_is_named() -> None:
    assert refusals(graph_of(fastres.models.preact_resnet(20))) == ()
    reasons = [refusal.reason for refusal in refusals(graph_of(Odd()))]
    assert len(reasons) == 2
    assert "without broadcasting" in reasons[0] and "no kernel for Softmax" in reasons[1]


@cache
def bottleneck(version: Any, size: int = 224) -> Graph:
    weights = fastres.models.resnet50(version=version, seed=0).state_dict()
    image = fastres.Input((1, 3, size, size))
    return optimise(fastres.build(weights, version=version, inputs=image))


@pytest.mark.parametrize("version", ["v1", "v1.5"])
def test_boundaries_cover_every_block_of_resnet50(version: Any) -> None:
    graph = bottleneck(version)
    found = boundaries(graph)
    assert len(found) == 16
    assert sum(b.projection is not None for b in found) == 4
    # v1 strides in the first 1x1 of a stage: nothing follows on the same pixels there
    assert sum(b.following is not None for b in found) == (15 if version == "v1.5" else 12)
    covered = [node.name for b in found for node in b.nodes]
    assert len(covered) == len(set(covered))
    assert set(projections(graph)) == {f"layer{i}.0.conv3" for i in range(1, 5)}


@pytest.mark.parametrize(("precision", "chained"), [("fp16", True), ("tf32", False)])
def test_hopper_runs_chains_and_boxes(precision: Any, chained: bool) -> None:
    plan = make_plan(bottleneck("v1.5"), ((256, 3, 224, 224),), precision, HOPPER)
    kinds = Counter(type(step).__name__ for step in plan.steps)
    assert kinds["LaunchConv2d"] == 0  # not the stem either, of three channels
    assert kinds["LaunchStemPool"] + kinds["LaunchStem"] == 1
    assert (kinds["LaunchChain"] > 0) == chained
    chains = [step for step in plan.steps if isinstance(step, LaunchChain)]
    apart = sum(3 if s.next_target else 2 for s in chains) + sum(
        s.projection is not None for s in chains
    )
    merged = [s for s in plan.steps if isinstance(s, LaunchBoxConv2d) and s.projection]
    assert kinds["LaunchBoxConv2d"] + len(merged) + apart == 52
    reasons = [c.others.get("chain", "") for c in plan.choices]
    assert any("256 channels" in r or "tf32 is not chained" in r for r in reasons)


def test_full_precision_and_older_gpus_run_through_pointers() -> None:
    graph = bottleneck("v1.5")
    for precision, target in (("fp32", HOPPER), ("fp16", AMPERE)):
        plan = make_plan(graph, ((1, 3, 224, 224),), precision, target)
        kinds = Counter(type(step).__name__ for step in plan.steps)
        stems = kinds["LaunchStemPool"]
        assert stems == (precision == "fp16") and kinds["LaunchConv2d"] + stems == 53
        assert kinds["LaunchBoxConv2d"] == kinds["LaunchChain"] == 0


def test_every_choice_says_what_else_there_was() -> None:
    plan = make_plan(bottleneck("v1.5"), ((256, 3, 224, 224),), "fp16", HOPPER)
    chosen = {name for choice in plan.choices for name in choice.nodes}
    convolutions = {node.name for node in bottleneck("v1.5") if isinstance(node.op, Conv2d)}
    assert convolutions <= chosen
    assert all(choice.others and choice.microseconds > 0 for choice in plan.choices[:16])


@pytest.mark.parametrize(
    ("batch", "target", "asked", "dependent"),
    [
        (1, HOPPER, None, True),
        (256, HOPPER, None, False),
        (256, HOPPER, True, True),
        (1, HOPPER, False, False),
        (1, AMPERE, None, False),
        (1, AMPERE, True, False),
    ],
    ids=["short", "long", "asked for", "not wanted", "older GPU", "asked of an older GPU"],
)
def test_short_launches_are_dependent(
    batch: int, target: Tiles, asked: bool | None, dependent: bool
) -> None:
    shapes = ((batch, 3, 224, 224),)
    plan = make_plan(bottleneck("v1.5"), shapes, "fp16", target, dependent=asked)
    assert plan.dependent is dependent
    told = [choice for choice in plan.choices if not choice.nodes]
    assert len(told) == (target is HOPPER)
    for choice in told:
        assert ("dependent" in choice.taken) is dependent
        assert choice.others and choice.microseconds >= 1e6 * seconds(plan)


def test_a_recorded_plan_keeps_its_launches() -> None:
    graph, shapes = bottleneck("v1.5"), ((256, 3, 224, 224),)
    for asked in (True, False):
        plan = make_plan(graph, shapes, "fp16", HOPPER, dependent=asked)
        assert make_plan(graph, shapes, "fp16", HOPPER, plan, dependent=not asked) == plan
    strange = msgspec.structs.replace(make_plan(graph, shapes, "fp16", AMPERE), dependent=True)
    with pytest.raises(ArtifactError, match="does not follow from the graph"):
        make_plan(graph, shapes, "fp16", AMPERE, strange)


@pytest.mark.parametrize("batch", [1, 256])
def test_where_no_tile_of_a_form_is_left_another_form_is_taken(batch: int) -> None:
    """As on a GPU whose compiler refuses all kernels but those that read through pointers."""
    graph, shapes, tiles = bottleneck("v1.5"), ((batch, 3, 224, 224),), Tiles(HOPPER.target)
    usual = {type(step) for step in make_plan(graph, shapes, "fp16", tiles).steps}
    for problem in list(tiles.asked()):
        if problem.kind not in ("pointers", "folded stem"):
            for tile in problem.candidates(tiles.target):
                tiles.ban(problem.key, tile, "it does not compile")
    plan = make_plan(graph, shapes, "fp16", tiles)
    kinds = Counter(type(step) for step in plan.steps)
    assert LaunchBoxConv2d in usual and kinds[LaunchConv2d] + kinds[LaunchStem] == 53
    assert not kinds.keys() & {LaunchBoxConv2d, LaunchChain, LaunchStemPool}
    assert any("no tile can run" in c.others.get("boxes", "") for c in plan.choices)


@pytest.mark.parametrize("batch", [1, 256])
def test_a_banned_tile_is_the_nodes_own(batch: int) -> None:
    """Also of a 1x1 that the chain in front of it leaves out: the chain's choice names it, too."""
    graph, shapes = bottleneck("v1.5"), ((batch, 3, 224, 224),)
    chained_for = set()
    asked = Tiles(HOPPER.target)
    plan = make_plan(graph, shapes, "fp16", asked)
    kinds = {problem.key: problem.kind for problem in asked.asked()}
    for step in plan.steps:
        if (tile := getattr(step, "tile", None)) is None:
            continue
        tiles = copy(asked)  # knows all estimates
        tiles.banned = {}
        ban(tiles, plan, step.node, "it spills")
        ((key, banned),) = tiles.banned
        assert banned == tile and isinstance(tile, TILE_OF[kinds[key]]), step.node
        after = {s.node: s for s in make_plan(graph, shapes, "fp16", tiles).steps}
        assert after.get(step.node) != step
        if sum(step.node in c.nodes and bool(c.problem) for c in plan.choices) > 1:
            chained_for.add(step.node)
    assert batch == 1 or "layer2.1.conv1" in chained_for


@pytest.mark.parametrize("target", [HOPPER, AMPERE], ids=["sm_90", "sm_80"])
def test_narrow_groups_share_a_product(target: Tiles) -> None:
    weights = fastres.models.resnext50_32x4d(seed=0).state_dict()
    graph = optimise(fastres.build(weights, version="v1.5"))
    plan = make_plan(graph, ((256, 3, 224, 224),), "fp16", target)
    grouped = [s for s in plan.steps if isinstance(s, LaunchConv2d) and s.groups == 32]
    assert len(grouped) == 16
    channels = {s.node: s.merged * graph.constants[s.weight].shape[1] for s in grouped}
    assert set(channels.values()) == {32}
    choice = next(c for c in plan.choices if c.nodes == ("layer1.0.conv2",))
    assert "8 groups at once" in choice.taken
    others = [text for form, text in choice.others.items() if form.startswith("pointers ")]
    assert float(others[0].split()[0]) > 1.5 * choice.microseconds
    assert make_plan(graph, ((256, 3, 224, 224),), "fp16", target, plan) is plan
    for merged in (0, 3, 5, 32):
        steps = [
            msgspec.structs.replace(s, merged=merged) if s.node == "layer1.0.conv2" else s
            for s in plan.steps
        ]
        strange = msgspec.structs.replace(plan, steps=tuple(steps))
        with pytest.raises(ArtifactError, match=r"layer1\.0\.conv2 that it cannot have"):
            make_plan(graph, ((256, 3, 224, 224),), "fp16", target, strange)


def test_the_table_shipped_for_the_h200_is_taken() -> None:
    """It holds estimates so far: the same as without it, but for tiles that spill."""
    (table,) = shipped_for(HOPPER.target)
    plan = make_plan(
        bottleneck("v1.5"), ((256, 3, 224, 224),), "fp16", Tiles(HOPPER.target, [table])
    )
    problems = [choice for choice in plan.choices if choice.problem]
    assert {choice.problem for choice in problems} <= table.entries.keys()
    for choice in problems:
        entry = table.entries[choice.problem]
        kind = next(kind for kind in TILE_OF if choice.problem.startswith(f"{kind} "))
        assert str(msgspec.convert(entry.tile, TILE_OF[kind])) in choice.taken
        assert choice.measured == entry.measured
    assert shipped_for(Target.typical(80)) == []


def test_small_grids_split_their_depth_and_get_scratch_memory() -> None:
    plan = make_plan(bottleneck("v1.5"), ((1, 3, 224, 224),), "fp16", HOPPER)
    split = [s for s in plan.steps if isinstance(s, LaunchBoxConv2d) and s.workspace]
    assert split
    for step in split:
        place = plan.places[step.workspace]
        assert place.dtype == "float32" and step.tile.split_k > 1


class Blocks(nn.Module):
    """Things that look like a bottleneck's end and are none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 64, 3, 1, 1),
            nn.Conv2d(64, 64, 1),
            nn.Conv2d(64, 64, 3, 1, 1),
        )
        self.d = nn.Conv2d(3, 64, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.a(x).relu()
        shared = (self.b(a) + self.d(x)).relu()  # somebody else reads a as well
        projected = self.d(x).relu()  # an activation of its own
        return shared, (self.c(a) + projected).relu(), a


def test_what_is_no_boundary_and_no_projection() -> None:
    graph = graph_of(Blocks())
    assert boundaries(graph) == []
    assert all(node.op.epilogue.activation is None for node in projections(graph).values())
    plan = make_plan(graph, ((1, 3, 32, 32),), "fp16", HOPPER)
    assert not any(isinstance(step, LaunchChain) for step in plan.steps)


def seconds(plan: Plan) -> float:
    """Of everything that a plan's choices stand for."""
    return 1e-6 * sum(
        choice.microseconds
        for choice in plan.choices
        if choice.nodes and not choice.taken.startswith("kernels of")
    )


@pytest.mark.parametrize(
    ("target", "slowest", "fastest"),
    [(HOPPER, 30_000, 90_300), (AMPERE, 7_000, 27_000)],
    ids=["H200", "A100"],
)
def test_estimates_stay_within_the_ceilings(target: Tiles, slowest: int, fastest: int) -> None:
    """No faster than memory and arithmetic allow with every fusion there is (docs/kernels.md)."""
    plan = make_plan(bottleneck("v1.5"), ((256, 3, 224, 224),), "fp16", target)
    assert slowest < 256 / seconds(plan) < fastest
