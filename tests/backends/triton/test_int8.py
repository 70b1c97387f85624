"""Int8 networks through our kernels: bit for bit what the reference's arithmetic gives."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.backends.reference import ReferenceExecutable
from fastres.backends.triton.backend import TritonExecutable
from fastres.backends.triton.planning.eight_bits import FLOAT_OF, inverse, is_whole, plain
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.plan import (
    AnyStep,
    LaunchBoxConv2d,
    LaunchChain,
    LaunchConv2d,
    LaunchElementwise,
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
from fastres.backends.triton.running.run_driver import DriverRunner
from fastres.backends.triton.shipping.cross import launches_of
from fastres.calib.table import CalibrationTable
from fastres.errors import UnsupportedError
from fastres.graph.capture import capture
from fastres.graph.ir import Conv2d, Graph, MaxPool, Quantize
from fastres.graph.passes.pipeline import optimise
from fastres.graph.passes.quantise import quantise
from fastres.kernels import chain_tiles, reference
from fastres.kernels.cost import Target
from fastres.kernels.layout import to_nhwc
from fastres.kernels.space_to_depth import space_to_depth
from fastres.options import Input
from fastres.quantization.calibrate import collect

PhotoBatch = Callable[[int, int], Tensor]
TILES = Tiles(Target.typical(90))
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
compiles = [
    pytest.mark.compile,
    pytest.mark.skipif(INTERPRETING, reason="the interpreter turns the compiler off"),
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


def two_layers(activation: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), activation(), nn.Conv2d(32, 32, 3), nn.ReLU()).eval()


def quantised(
    model: nn.Module, images: Tensor, keep: tuple[str, ...] = ()
) -> tuple[Graph, CalibrationTable]:
    inputs = (Input((1, *images.shape[1:])),)
    graph = optimise(capture(model, inputs).graph)
    table = collect(graph, inputs, [(images,)], "mse")
    table = msgspec.structs.replace(table, keep=keep)
    return quantise(graph, table, "skip"), table


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
        self, photo_batch: PhotoBatch, shortcut: Any, sm: int
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
        self, photo_batch: PhotoBatch, version: Any, size: int
    ) -> None:
        images = photo_batch(8, size)
        model = Features(narrow(images, version=version)).eval()
        graph, _ = quantised(model, images)
        y, plan = run(graph, images[:2], Tiles(Target.typical(90)))
        assert torch.equal(y, exact(graph, images[:2])[plain(graph).graph.outputs[0]])
        apart = size % 2  # an odd picture is not folded: then on int8, by the stem's own scale
        assert len(steps(plan, LaunchMaxPool)) == apart

    def test_chains_bit_for_bit(
        self, photo_batch: PhotoBatch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of blocks without a projection; the last, whose result is fp16, stays in parts."""
        images = photo_batch(8, 32)
        net = fastres.models.ResNet(
            fastres.models.Bottleneck, (3, 1, 1), planes=64, stem="cifar", num_classes=7, seed=0
        )
        fastres.models.settle(net, images)
        graph, _ = quantised(Features(net).eval(), images)
        monkeypatch.setattr(chain_tiles, "chain_seconds", lambda *sizes: 0.0)
        y, plan = run(graph, images[:1], Tiles(Target.typical(90)))
        chains = steps(plan, LaunchChain)
        assert [step.node for step in chains] == ["net.layer1.1.conv3", "net.layer1.2.conv3"]
        assert all(step.scales is not None for step in chains)  # type: ignore[union-attr]
        assert torch.equal(y, exact(graph, images[:1])[plain(graph).graph.outputs[0]])

    def test_groups_bit_for_bit(self, photo_batch: PhotoBatch) -> None:
        images = photo_batch(8, 32)
        model = Features(narrow(images, planes=32, groups=8, width_per_group=8)).eval()
        graph, _ = quantised(model, images)
        y, _ = run(graph, images[:1], Tiles(Target.typical(90)))
        assert torch.equal(y, exact(graph, images[:1])[plain(graph).graph.outputs[0]])

    @pytest.mark.parametrize("together", [False, True], ids=["folded", "with its pool"])
    def test_stems_over_folded_pictures_bit_for_bit(
        self, photo_batch: PhotoBatch, together: bool
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

    def test_pictures_are_quantised_as_they_are_read(self, photo_batch: PhotoBatch) -> None:
        preprocess = fastres.Preprocess(resize=None, crop=None)
        pictures = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
        floats = torch.stack([preprocess(p.numpy()) for p in pictures])
        net = cifar(photo_batch(8, 32))
        table = fastres.quantize(net, floats, algorithm="mse")
        settings: dict[str, Any] = {"calibration": table, "backend": "triton", "device": DEVICE}
        fused = fastres.compile(
            net, floats[:1], preprocess=preprocess, io_dtype=torch.uint8, **settings
        )
        plain_engine = fastres.compile(net, floats[:1], **settings)
        x, y = fused(pictures.to(DEVICE)), plain_engine(floats.to(DEVICE))
        # a pixel at the edge between two steps may round either way
        torch.testing.assert_close(x, y, rtol=0, atol=0.03 * float(y.abs().max()))
        assert fastres.verify(net, fused, pictures).passed

    @pytest.mark.parametrize(
        "keep",
        [
            (),
            ("layer2.0.conv2",),
            ("conv1", "fc"),
            ("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2"),
        ],
        ids=["none", "one with a shortcut A", "the ends", "the middle"],
    )
    def test_layers_left_in_floating_point(
        self, photo_batch: PhotoBatch, keep: tuple[str, ...]
    ) -> None:
        images = photo_batch(8, 32)
        net = cifar(images, shortcut="A")
        table = msgspec.structs.replace(fastres.quantize(net, images, algorithm="mse"), keep=keep)
        engine = fastres.compile(
            net, images[:2], calibration=table, backend="triton", device=DEVICE
        )
        assert {n.name: n.precision for n in engine.info.not_quantised} == dict.fromkeys(
            keep, "fp16"
        )
        report = fastres.verify(net, engine, images[:2])
        assert report.passed, str(report)
        executable = engine._lowered.executable
        assert isinstance(executable, TritonExecutable)
        casts = steps(executable._runners.latest().plan, LaunchElementwise)
        # a shortcut read in int8 by other layers is turned back for one that stays
        assert (len(keep) == 1) == any("dequantized" in step.node for step in casts)

    def test_layer_by_layer_and_in_parts(self, photo_batch: PhotoBatch) -> None:
        """All values as outputs: the shortcuts' slices and pads are run in PyTorch in between."""
        images = photo_batch(8, 32)
        net = cifar(images, shortcut="A")
        table = fastres.quantize(net, images, algorithm="mse")
        engine = fastres.compile(
            net, images[:2], calibration=table, backend="triton", device=DEVICE
        )
        report = fastres.verify(net, engine, images[:2], layerwise=True)
        assert report.passed, str(report)
        assert engine(images[:0].to(DEVICE)).shape == (0, 10)


class Odd(nn.Module):
    """Sums that no convolution makes, activations by themselves, an average pool, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 16, 1),
            nn.Conv2d(16, 8, 1),
        )

    def forward(self, x: Tensor) -> Any:
        y = self.a(x).relu()
        z = self.b(nn.functional.avg_pool2d(y, 2, 2))
        w = nn.functional.silu(z + nn.functional.max_pool2d(y, 2, 2))
        return self.c(w), w, y


class TestOddNetworks:
    pytestmark = runs

    def test_a_factor_behind_an_activation(self, photo_batch: PhotoBatch) -> None:
        images = photo_batch(8, 12)
        model = two_layers(nn.SiLU)
        engine = fastres.compile(
            model, images[:2], calibration=[images], backend="triton", device=DEVICE
        )
        report = fastres.verify(model, engine, images[:2])
        assert report.passed, str(report)

    def test_sums_activations_and_outputs(self) -> None:
        model = Odd().eval()
        x = torch.randn(4, 3, 12, 10, generator=torch.Generator().manual_seed(1))
        table = fastres.quantize(model, x, algorithm="minmax")
        engine = fastres.compile(model, x[:2], calibration=table, backend="triton", device=DEVICE)
        report = fastres.verify(model, engine, x[:2])
        assert report.passed, str(report)
        assert [tuple(y.shape) for y in engine(x.to(DEVICE))] == [
            (4, 8, 6, 5),
            (4, 16, 6, 5),
            (4, 16, 12, 10),
        ]


class TestPlans:
    def test_plain_graphs_have_no_pairs(self, photo_batch: PhotoBatch) -> None:
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
        self, photo_batch: PhotoBatch, activation: type[nn.Module], before: bool
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

    def test_stored_plans_are_taken_over(self, photo_batch: PhotoBatch) -> None:
        images = photo_batch(8, 32)
        graph, _ = quantised(cifar(images), images)
        tiles = Tiles(Target.typical(90))
        plan = make_plan(graph, ((4, 3, 32, 32),), "int8", tiles)
        again = Plan.from_json(plan.to_json())
        assert again == plan
        assert make_plan(graph, ((4, 3, 32, 32),), "int8", tiles, again) is again

    def test_int8_takes_half_the_memory(self, photo_batch: PhotoBatch) -> None:
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


@pytest.mark.parametrize(
    ("target", "wanted", "banned"),
    [("sm_80", "IMMA", "HMMA"), ("sm_90", "IGMMA", "IMMA"), ("sm_120", "IMMA", "HMMA")],
)
class TestBuilds:
    pytestmark = compiles

    def test_every_product_is_one_of_integers(
        self, photo_batch: PhotoBatch, target: str, wanted: str, banned: str
    ) -> None:
        images = photo_batch(8, 32)
        net = cifar(images)
        kept = "layer2.0.conv1"
        table = fastres.quantize(net, images, algorithm="mse", ignored=[kept])
        engine = fastres.compile(
            net, fastres.Input((8, 3, 32, 32)), target=target, calibration=table
        )
        kernels = engine.info.account.kernels
        products = [k for k in kernels if k.kernel.startswith("conv2d") and kept not in k.nodes]
        assert len(products) >= 4
        for kernel in products:
            assert wanted in kernel.instructions and banned not in kernel.instructions
        assert all(kernel.spilled == 0 for kernel in kernels)
        assert [node.name for node in engine.info.not_quantised] == [kept]


class TestFp8:
    """Interpreted kernels round to fp8 wrongly: here they are compiled, and run on a GPU."""

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    def test_parity(self, photo_batch: PhotoBatch) -> None:
        images = photo_batch(8, 32)
        net = cifar(images)
        settings: dict[str, Any] = {"backend": "triton", "precision": "fp8"}
        engine = fastres.compile(net, images[:2], calibration=[images], **settings)
        report = fastres.verify(net, engine, images[:2])
        assert report.passed, str(report)

    @pytest.mark.compile
    @pytest.mark.skipif(INTERPRETING, reason="the interpreter turns the compiler off")
    @pytest.mark.parametrize(("target", "wanted"), [("sm_89", "QMMA"), ("sm_90", "QGMMA")])
    def test_builds(self, photo_batch: PhotoBatch, target: str, wanted: str) -> None:
        images = photo_batch(8, 32)
        engine = fastres.compile(
            cifar(images),
            fastres.Input((8, 3, 32, 32)),
            target=target,
            precision="fp8",
            calibration=[images],
        )
        kernels = engine.info.account.kernels
        products = [k for k in kernels if k.kernel.startswith("conv2d")]
        assert len(products) >= 4 and all(wanted in k.instructions for k in products)
        assert all(k.spilled == 0 for k in kernels)
        assert engine.info.not_quantised == () and "fp8" in engine.info.precisions

    def test_older_gpus_are_refused(self, photo_batch: PhotoBatch) -> None:
        images = photo_batch(8, 32)
        graph, _ = quantised(cifar(images), images)
        with pytest.raises(UnsupportedError, match="fp8 needs sm_89 or newer, this is sm_80"):
            make_plan(graph, ((1, 3, 32, 32),), "fp8", Tiles(Target.typical(80)))

    def test_the_reference_is_pytorchs_cast(self, photo_batch: PhotoBatch) -> None:
        images = photo_batch(8, 32)
        net = cifar(images)
        settings: dict[str, Any] = {"backend": "reference", "precision": "fp8"}
        engine = fastres.compile(net, images[:2], calibration=[images], **settings)
        graph = engine.graph
        node = graph["conv1"]
        weight = graph.constants[node.params["weight"]]
        assert weight.dtype == torch.float8_e4m3fn
        assert weight.float().flatten(1).abs().amax(1).eq(448).all()
        (x,) = (n for n in graph.nodes if n.name == "x.quantized")
        scale = x.op.scale  # type: ignore[union-attr]
        step = (images[:2] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        values = ReferenceExecutable(graph, torch.float32).values([images[:2]])
        assert torch.equal(values["x.dequantized"], step)
        assert fastres.verify(net, engine, images[:2]).outputs[0].sqnr_db > 5


class TestInputsOfMachineCode:
    """They are brought in by PyTorch: rounded and saturated to the bits of the kernels."""

    pytestmark = runs

    @pytest.mark.parametrize("folded", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
    def test_bits(self, folded: bool, dtype: torch.dtype) -> None:
        scale = 0.0173
        x = 3 * torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(0))
        x[0, 0, 0, :4] = torch.tensor([0.5, 1.5, -2.5, 1000.0]) * scale  # ties, out of range
        x = x.to(DEVICE, dtype)
        kernel = space_to_depth if folded else to_nhwc
        wanted = kernel(x.float(), dtype=torch.int8, out_scale=inverse(scale))
        found = torch.full_like(wanted, 99)
        step = LoadInput("x", "x", "x", folded=folded, scale=scale)
        runner = object.__new__(DriverRunner)
        runner.plan = SimpleNamespace(places={"x": SimpleNamespace(tf32=False)})
        runner.load(step, x, found)
        assert torch.equal(found, wanted) and wanted.float().std() > 20
