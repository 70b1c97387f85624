"""Plans of 8 bits: scales instead of pairs of nodes, half the memory, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.backends.triton.planning.eight_bits import FLOAT_OF, inverse, plain
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.plan import AnyStep, LaunchConv2d, Plan
from fastres.backends.triton.planning.table import Tiles
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.shipping.cross import launches_of
from fastres.calib.table import CalibrationTable
from fastres.errors import UnsupportedError
from fastres.graph.capture import capture
from fastres.graph.ir import Graph, Quantize
from fastres.graph.passes.pipeline import optimise
from fastres.kernels.cost import Target
from fastres.options import Input

PhotoBatch = Callable[[int, int], Tensor]
Quantised = Callable[[nn.Module, Tensor], tuple[Graph, CalibrationTable]]
TILES = Tiles(Target.typical(90))


def cifar(images: Tensor, **more: Any) -> nn.Module:
    return fastres.models.settle(fastres.models.cifar_resnet(8, seed=0, **more), images)


def two_layers(activation: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), activation(), nn.Conv2d(32, 32, 3), nn.ReLU()).eval()


def steps(plan: Plan, kind: type[AnyStep]) -> list[AnyStep]:
    return [step for step in plan.steps if isinstance(step, kind)]


class TestPlans:
    def test_plain_graphs_have_no_pairs(
        self, photo_batch: PhotoBatch, quantised: Quantised
    ) -> None:
        images = photo_batch(8, 32)
        graph, table = quantised(cifar(images), images)
        source = plain(graph)
        assert not any(isinstance(node.op, Quantize) for node in source.graph.nodes)
        assert set(source.scales) == {
            node.inputs[0] for node in graph.nodes if isinstance(node.op, Quantize)
        }
        assert all(source.scales[name] == table.scale(name) for name in ("x", "conv1"))
        untouched = optimise(capture(cifar(images), (Input((1, 3, 32, 32)),)).graph)
        assert plain(untouched).graph is untouched

    @pytest.mark.parametrize(("activation", "before"), [(nn.ReLU, True), (nn.SiLU, False)])
    def test_the_results_scale_stands_before_a_relu(
        self,
        photo_batch: PhotoBatch,
        quantised: Quantised,
        activation: type[nn.Module],
        before: bool,
    ) -> None:
        """There it is part of other factors; behind, each sum is multiplied once more."""
        images = photo_batch(8, 32)
        graph, table = quantised(two_layers(activation), images)
        plan, target = make_plan(graph, ((4, 3, 32, 32),), "int8", TILES), TILES.target
        constants = Packed(graph, FLOAT_OF["int8"], torch.device("meta"))
        first, last = (launch for _, launch in launches_of(plan, constants, target))
        factor = inverse(table.scale("0"))
        assert first.arguments["out_scale"] == (None if before else factor)
        assert last.arguments["out_scale"] is None  # of a result in floating point
        keys = {key[0]: key for key in constants.made() if key[1].startswith("0.")}
        assert (keys["bias"][-1] == keys["products"][-1] == factor) == before

    def test_stored_plans_are_taken_over(
        self, photo_batch: PhotoBatch, quantised: Quantised
    ) -> None:
        images = photo_batch(8, 32)
        graph, _ = quantised(cifar(images), images)
        tiles = Tiles(Target.typical(90))
        plan = make_plan(graph, ((4, 3, 32, 32),), "int8", tiles)
        again = Plan.from_json(plan.to_json())
        assert again == plan
        assert make_plan(graph, ((4, 3, 32, 32),), "int8", tiles, again) is again

    def test_int8_takes_half_the_memory(
        self, photo_batch: PhotoBatch, quantised: Quantised
    ) -> None:
        images = photo_batch(8, 32)
        model = cifar(images)
        graph, _ = quantised(model, images)
        half = optimise(capture(model, (Input((1, 3, 32, 32)),)).graph)
        tiles = Tiles(Target.typical(90))
        shape = ((64, 3, 32, 32),)
        arenas = [
            make_plan(g, shape, p, tiles).arena_bytes
            for g, p in ((graph, "int8"), (half, "fp16"))  # type: ignore[arg-type]
        ]
        assert arenas[0] < 0.6 * arenas[1]
        kinds = {
            step.scales is not None
            for step in steps(make_plan(graph, shape, "int8", tiles), LaunchConv2d)
        }  # type: ignore[union-attr]
        assert kinds <= {True}

    def test_older_gpus_are_refused(self, photo_batch: PhotoBatch, quantised: Quantised) -> None:
        images = photo_batch(8, 32)
        graph, _ = quantised(cifar(images), images)
        with pytest.raises(UnsupportedError, match="fp8 needs sm_89 or newer, this is sm_80"):
            make_plan(graph, ((1, 3, 32, 32),), "fp8", Tiles(Target.typical(80)))
