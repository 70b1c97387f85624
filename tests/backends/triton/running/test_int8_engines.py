"""Engines of 8 bits: pictures, layers that stay in floating point, odd networks, fp8."""

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
from fastres.backends.triton.planning.eight_bits import inverse
from fastres.backends.triton.planning.plan import LaunchElementwise, LoadInput
from fastres.backends.triton.running.run_driver import DriverRunner
from fastres.kernels.layout import to_nhwc
from fastres.kernels.space_to_depth import space_to_depth

PhotoBatch = Callable[[int, int], Tensor]
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


def cifar(images: Tensor, **more: Any) -> nn.Module:
    return fastres.models.settle(fastres.models.cifar_resnet(8, seed=0, **more), images)


def two_layers(activation: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), activation(), nn.Conv2d(32, 32, 3), nn.ReLU()).eval()


class TestEngines:
    pytestmark = runs

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
        steps = executable._runners.latest().plan.steps
        casts = [step for step in steps if isinstance(step, LaunchElementwise)]
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


class TestFp8:
    """Interpreted kernels round to fp8 wrongly: the reference has it here, and a GPU."""

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    def test_parity(self, photo_batch: PhotoBatch) -> None:
        images = photo_batch(8, 32)
        net = cifar(images)
        settings: dict[str, Any] = {"backend": "triton", "precision": "fp8"}
        engine = fastres.compile(net, images[:2], calibration=[images], **settings)
        report = fastres.verify(net, engine, images[:2])
        assert report.passed, str(report)

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
