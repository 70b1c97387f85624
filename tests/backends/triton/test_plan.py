"""From graph to plan: regions, memory, what is refused, and the plan as data."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.backends.triton.lower import make_plan, refusals
from fastres.backends.triton.plan import LaunchConv2d, LaunchLinear, LoadInput, Plan
from fastres.backends.triton.regions import shortcuts
from fastres.graph.capture import capture
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.kernels.cost import Target

HOPPER = Target.typical(90)


def graph_of(model: nn.Module, size: int = 32) -> Graph:
    return optimise(capture(model.eval(), [fastres.Input((2, 3, size, size))]).graph)


def test_one_launch_per_convolution_and_no_shortcut_node_runs() -> None:
    graph = graph_of(fastres.models.cifar_resnet(20, shortcut="A"))
    assert refusals(graph) == ()
    plan = make_plan(graph, ((4, 3, 32, 32),), "fp16", HOPPER)
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
    assert plan.arena_bytes < everything / 6
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


def test_what_has_no_kernel_is_named() -> None:
    graph = graph_of(fastres.models.preact_resnet(20))
    reasons = {type(graph[r.node].op).__name__ for r in refusals(graph)}
    assert reasons == {"BatchNorm"}
