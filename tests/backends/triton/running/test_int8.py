"""Int8 networks through our kernels: bit for bit what the reference's arithmetic gives."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.backends.triton.planning.eight_bits import FLOAT_OF, is_whole, plain
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.plan import (
    AnyStep,
    LaunchBoxConv2d,
    LaunchChain,
    LaunchMaxPool,
    LaunchStem,
    LaunchStemPool,
    LoadInput,
    Plan,
)
from fastres.backends.triton.planning.table import Entry, Machine, Table, Tiles
from fastres.backends.triton.planning.tensors import COUNTERS
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.running.run import PlanRunner
from fastres.calib.table import CalibrationTable
from fastres.graph.ir import Conv2d, Graph, MaxPool
from fastres.kernels import reference
from fastres.kernels.cost import Target
from fastres.kernels.tiles import chain

PhotoBatch = Callable[[int, int], Tensor]
Quantised = Callable[[nn.Module, Tensor], tuple[Graph, CalibrationTable]]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETING else "cuda")
runs = [
    pytest.mark.interpret,
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETING and not torch.cuda.is_available(),
        reason="needs TRITON_INTERPRET=1 or an NVIDIA GPU",
    ),
]


class Features(nn.Module):
    """A residual network without its head: the last map is the result."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        net: Any = self.net
        y = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            y = getattr(net, name)(y) if hasattr(net, name) else y
        return y


def narrow(images: Tensor, **more: Any) -> nn.Module:
    """A bottleneck net with ImageNet's stem."""
    settings: dict[str, Any] = {"planes": 16, "num_classes": 7, "seed": 0, **more}
    net = fastres.models.ResNet(fastres.models.Bottleneck, (1, 1, 1, 1), **settings)
    return fastres.models.settle(net, images)


def cifar(images: Tensor, **more: Any) -> nn.Module:
    return fastres.models.settle(fastres.models.cifar_resnet(8, seed=0, **more), images)


def exact(graph: Graph, x: Tensor) -> dict[str, Tensor]:
    """Every value as `kernels/reference.py` computes it: int8 where it is read so, else fp32."""
    source = plain(graph)
    (value,) = source.graph.inputs
    step = torch.tensor(source.scales[value.name])
    values = {value.name: reference.requantise(x * (1 / step))}
    for node in source.graph.nodes:
        constants = {slot: graph.constants[name] for slot, name in node.params.items()}
        if isinstance(node.op, MaxPool):
            pooled = reference.max_pool(values[node.inputs[0]].float(), *_window(node.op))
            values[node.name] = pooled.to(torch.int8)
            continue
        if not isinstance(node.op, Conv2d):  # shortcut A's slice and pad
            op: Any = node.op
            taken = values[node.inputs[0]]
            values[node.name] = (
                reference.slice_(taken, op.starts, op.stops, op.steps)
                if hasattr(op, "starts")
                else reference.pad(taken, op.before, op.after)
            )
            continue
        assert is_whole(node)
        target = source.scales.get(node.name)
        last = node.name in source.graph.outputs or target is None
        residual = values[node.inputs[1]] if node.op.epilogue.residual else None
        factor = 1.0 if last or target is None else float(1 / torch.tensor(target))
        assert node.op.epilogue.activation in (None, "relu"), "factors stand before these"
        values[node.name] = reference.conv2d_int8(
            values[node.inputs[0]],
            constants["weight"],
            constants["scale"] * torch.tensor(source.scales[node.inputs[0]]) * torch.tensor(factor),
            (constants["bias"].double() * factor).float(),
            stride=node.op.stride,
            padding=node.op.padding,
            dilation=node.op.dilation,
            groups=node.op.groups,
            residual=residual,
            residual_scale=source.scales[node.inputs[1]] * factor if residual is not None else 1.0,
            activation=node.op.epilogue.activation,
            dtype=torch.float16 if last else torch.int8,
        )
    return values


def _window(op: MaxPool) -> tuple[Any, ...]:
    return op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode


def run(graph: Graph, x: Tensor, tiles: Tiles) -> tuple[Tensor, Plan]:
    """Through the kernels, over memory that holds rubbish."""
    plan = make_plan(graph, (tuple(x.shape),), "int8", tiles)
    runner = PlanRunner(plan, Packed(graph, FLOAT_OF["int8"], DEVICE), DEVICE)
    with runner.context() as context:
        context.arena.fill_(0x80)
        if COUNTERS in context.tensors:
            context.tensors[COUNTERS].zero_()  # as every launch leaves them
    (y,) = runner.run([x.to(DEVICE)])
    return y.cpu(), plan


def steps(plan: Plan, kind: type[AnyStep]) -> list[AnyStep]:
    return [step for step in plan.steps if isinstance(step, kind)]


class TestRuns:
    pytestmark = runs

    @pytest.mark.parametrize("sm", [80, 90])
    @pytest.mark.parametrize("shortcut", ["A", "B"])
    def test_basic_blocks_bit_for_bit(
        self, photo_batch: PhotoBatch, quantised: Quantised, shortcut: Any, sm: int
    ) -> None:
        images = photo_batch(8, 32)
        graph, _ = quantised(Features(cifar(images, shortcut=shortcut)).eval(), images)
        y, plan = run(graph, images[:2], Tiles(Target.typical(sm)))
        assert torch.equal(y, exact(graph, images[:2])[plain(graph).graph.outputs[0]])
        assert bool(steps(plan, LaunchBoxConv2d)) == (sm == 90)
        assert {place.dtype for place in plan.places.values()} <= {"int8", "float16", "int32"}

    @pytest.mark.parametrize("version", ["v1", "v1.5"])
    @pytest.mark.parametrize("size", [40, 39], ids=["even", "odd"])
    def test_bottlenecks_bit_for_bit(
        self, photo_batch: PhotoBatch, quantised: Quantised, version: Any, size: int
    ) -> None:
        images = photo_batch(8, size)
        model = Features(narrow(images, version=version)).eval()
        graph, _ = quantised(model, images)
        y, plan = run(graph, images[:2], Tiles(Target.typical(90)))
        assert torch.equal(y, exact(graph, images[:2])[plain(graph).graph.outputs[0]])
        apart = size % 2  # an odd picture is not folded: then on int8, by the stem's own scale
        assert len(steps(plan, LaunchMaxPool)) == apart

    def test_chains_bit_for_bit(
        self, photo_batch: PhotoBatch, quantised: Quantised, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of blocks without a projection; the last, whose result is fp16, stays in parts."""
        images = photo_batch(8, 32)
        net = fastres.models.ResNet(
            fastres.models.Bottleneck, (3, 1, 1), planes=64, stem="cifar", num_classes=7, seed=0
        )
        fastres.models.settle(net, images)
        graph, _ = quantised(Features(net).eval(), images)
        monkeypatch.setattr(chain, "chain_seconds", lambda *sizes: 0.0)
        y, plan = run(graph, images[:1], Tiles(Target.typical(90)))
        chains = steps(plan, LaunchChain)
        assert [step.node for step in chains] == ["net.layer1.1.conv3", "net.layer1.2.conv3"]
        assert all(step.scales is not None for step in chains)  # type: ignore[union-attr]
        assert torch.equal(y, exact(graph, images[:1])[plain(graph).graph.outputs[0]])

    def test_groups_bit_for_bit(self, photo_batch: PhotoBatch, quantised: Quantised) -> None:
        images = photo_batch(8, 32)
        model = Features(narrow(images, planes=32, groups=8, width_per_group=8)).eval()
        graph, _ = quantised(model, images)
        y, _ = run(graph, images[:1], Tiles(Target.typical(90)))
        assert torch.equal(y, exact(graph, images[:1])[plain(graph).graph.outputs[0]])

    @pytest.mark.parametrize("together", [False, True], ids=["folded", "with its pool"])
    def test_stems_over_folded_pictures_bit_for_bit(
        self, photo_batch: PhotoBatch, quantised: Quantised, together: bool
    ) -> None:
        images = photo_batch(8, 40)
        graph, _ = quantised(Features(narrow(images)).eval(), images)
        tiles = Tiles(Target.typical(90))
        make_plan(graph, ((2, 3, 40, 40),), "int8", tiles)
        of_kind = {"stem and pool": 9.0, "pointers": 9.0, "folded stem": 1.0, "max pool": 1.0}
        times = {p: of_kind[p.kind] for p in tiles.asked() if p.kind in of_kind}
        entries = {p.key: Entry(dict(vars(tiles.best(p).tile)), us) for p, us in times.items()}
        tables = [Table(Machine("a GPU", 1, "", ""), entries)]
        y, plan = run(graph, images[:2], Tiles(Target.typical(90), [] if together else tables))
        assert torch.equal(y, exact(graph, images[:2])[plain(graph).graph.outputs[0]])
        assert len(steps(plan, LaunchStemPool if together else LaunchStem)) == 1
        assert plan.places[plan.steps[0].node].dtype == "int8"
        load = plan.steps[0]
        assert isinstance(load, LoadInput) and load.folded and load.scale is not None
