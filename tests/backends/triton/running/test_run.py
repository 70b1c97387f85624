"""Whole networks through our kernels, interpreted or on a GPU, against PyTorch in float64."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.backends.triton.backend import TritonExecutable
from fastres.backends.triton.planning.plan import LaunchConv2d
from fastres.backends.triton.planning.tensors import COUNTERS
from fastres.options import Precision

PhotoBatch = Callable[[int, int], Tensor]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETING else "cuda"
pytestmark = [
    pytest.mark.interpret,
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETING and not torch.cuda.is_available(),
        reason="needs TRITON_INTERPRET=1 or an NVIDIA GPU",
    ),
]


def compile(model: nn.Module, x: Tensor, precision: Precision, **more: Any) -> fastres.Engine:
    return fastres.compile(model, x, backend="triton", device=DEVICE, precision=precision, **more)


def poison(engine: fastres.Engine, x: Tensor) -> None:
    """Fills the memory that the next run will use with NaN."""
    executable = engine._lowered.executable
    assert isinstance(executable, TritonExecutable)
    runner = executable._runner((tuple(x.shape),))
    with runner.context() as context:
        context.arena.fill_(0xFF)
        if COUNTERS in context.tensors:
            context.tensors[COUNTERS].zero_()  # as every launch leaves them


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_cifar_resnet20(photo_batch: PhotoBatch, shortcut: Any, precision: Precision) -> None:
    model = fastres.models.cifar_resnet(20, shortcut=shortcut, seed=0)
    model = fastres.models.settle(model, photo_batch(32, 32))
    x = photo_batch(1, 32)
    with compile(model, x, precision) as engine:
        poison(engine, x)
        report = fastres.verify(model, engine, [x])
        assert report.passed, str(report)
        assert {node.precision for node in engine.info.nodes} == {precision}


@pytest.mark.parametrize("version", ["v1", "v1.5"])
def test_narrow_bottleneck_net(photo_batch: PhotoBatch, version: Any) -> None:
    """7x7 stem, max pool, projections, strides, at 40 pixels: odd maps further down."""
    model = fastres.models.ResNet(
        fastres.models.Bottleneck, (1, 1, 1, 1), version=version, num_classes=7, planes=16, seed=0
    )
    model = fastres.models.settle(model, photo_batch(32, 40))
    x = photo_batch(2, 40)
    with compile(model, x, "fp16") as engine:
        poison(engine, x)
        report = fastres.verify(model, engine, [x])
        assert report.passed, str(report)
        x = x.to(DEVICE)
        assert torch.equal(engine(x), engine(x))
        assert engine(x[:0]).shape == (0, 7)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_dependent_launches_change_no_bit(photo_batch: PhotoBatch, precision: Precision) -> None:
    """In the interpreter they are no other launches; on a GPU they are told to overlap."""
    model = fastres.models.settle(fastres.models.cifar_resnet(20, seed=0), photo_batch(32, 32))
    x = photo_batch(2, 32)
    found = []
    for asked in (True, False):
        with compile(model, x, precision, dependent_launch=asked) as engine:
            for _ in range(20):  # a race does not show at once
                poison(engine, x)
                found.append(engine(x))
                if INTERPRETING:
                    break
    assert all(torch.equal(found[0], y) for y in found)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_batch_norms_that_cannot_be_folded(photo_batch: PhotoBatch, precision: Precision) -> None:
    model = fastres.models.PreActResNet(1, seed=0)
    model = fastres.models.settle(model, photo_batch(32, 16))
    x = photo_batch(1, 16)
    with compile(model, x, precision) as engine:
        assert engine.info.fallbacks == ()
        assert "batchnorm" in {node.op for node in engine.info.nodes}
        poison(engine, x)
        report = fastres.verify(model, engine, [x], layerwise=True)
        assert report.passed, str(report)


class Grouped(nn.Module):
    """A ResNeXt block's middle, a depthwise convolution, and groups that nothing divides well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.narrow = nn.Conv2d(32, 64, 3, 2, 1, groups=8)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.uneven = nn.Conv2d(64, 60, 1, groups=4)
        self.odd = nn.Conv2d(60, 30, 3, padding=1, groups=15)

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(self.first(x).relu()).relu()
        y = y + self.depthwise(y).relu()
        return self.odd(self.uneven(y).relu())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_groups(precision: Precision) -> None:
    model = Grouped().eval()
    x = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(1))
    with compile(model, x, precision) as engine:
        poison(engine, x)
        report = fastres.verify(model, engine, [x], layerwise=True)
        assert report.passed, str(report)
        executable = engine._lowered.executable
        assert isinstance(executable, TritonExecutable)
        steps = executable._runners.latest().plan.steps
        assert any(step.merged > 1 for step in steps if isinstance(step, LaunchConv2d))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy of 0 * inf
def test_not_finite_numbers_stay_in_their_group() -> None:
    model = nn.Conv2d(32, 64, 3, 2, 1, groups=8).eval()
    x = torch.randn(2, 32, 9, 7, generator=torch.Generator().manual_seed(1))
    x[0, 5, 4, 3], x[0, 22, 0, 6] = float("nan"), float("inf")
    with compile(model, x, "fp32") as engine:
        executable = engine._lowered.executable
        assert isinstance(executable, TritonExecutable)
        (step,) = executable._runner((tuple(x.shape),)).plan.steps[1:]
        assert isinstance(step, LaunchConv2d) and step.merged > 1
        y, expected = engine(x), model(x)
        assert not expected[0, :, 2:3, 1:2].isfinite().all() and expected[1].isfinite().all()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


class Elementwise(nn.Module):
    """Average pools, an addition of what no convolution makes, activations by themselves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 24, 3, padding=1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        mean = nn.functional.avg_pool2d(y, 3, 2, 1, count_include_pad=False)
        best = nn.functional.max_pool2d(y, 3, 2, 1)
        both = (mean + best).relu()
        rows = nn.functional.silu(both).mean((2, 3))
        return both, self.fc(rows) + self.fc(nn.functional.gelu(rows))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_pools_sums_and_activations(precision: Precision) -> None:
    model = Elementwise().eval()
    x = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(1))
    with compile(model, x, precision) as engine:
        assert engine.info.fallbacks == ()
        poison(engine, x)
        report = fastres.verify(model, engine, [x], layerwise=True)
        assert report.passed, str(report)


class Softened(nn.Module):
    """A softmax between convolutions, which no kernel of ours computes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().softmax(1))


def test_fallback_around_a_softmax() -> None:
    model = Softened().eval()
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with compile(model, x, "fp32", on_unsupported="fallback") as engine:
        assert {node.op for node in engine.info.fallbacks} == {"softmax"}
        report = fastres.verify(model, engine, [x])
        assert report.passed, str(report)


def test_profile_names_every_launch(photo_batch: PhotoBatch, tmp_path: Path) -> None:
    model = fastres.models.settle(fastres.models.cifar_resnet(8), photo_batch(16, 16))
    x = photo_batch(1, 16)
    with compile(model, x, "fp16") as engine:
        file = tmp_path / "trace.json"
        names = {row.name for row in engine.profile(x.to(DEVICE), trace=file).rows}
        assert {"conv1", "fc"} <= {e["name"] for e in json.loads(file.read_text())["traceEvents"]}
        assert {"conv1", "layer3.0.conv2", "avgpool", "fc"} <= names


@pytest.mark.skipif(INTERPRETING, reason="hours in the interpreter")
@pytest.mark.parametrize("version", ["v1", "v1.5"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_resnet50(photo_batch: PhotoBatch, version: Any, precision: Precision) -> None:
    model = fastres.models.settle(
        fastres.models.resnet50(version=version, seed=0), photo_batch(8, 224)
    )
    x = photo_batch(4, 224)
    with compile(model, x, precision) as engine:
        poison(engine, x)
        report = fastres.verify(model, engine, [x], layerwise=True)
        assert report.passed, str(report)


class Squeeze(nn.Module):
    """Pooled values that are read as maps, and maps of one pixel that are read as rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
        self.pool, self.fc = nn.MaxPool2d(6), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.a(x).relu()
        pooled = nn.functional.adaptive_avg_pool2d(x, 1)
        return self.b(pooled), self.fc(self.pool(x).flatten(1)), pooled.flatten(1)


def test_pooled_values_as_maps_and_as_rows() -> None:
    model = Squeeze().eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with compile(model, x, "fp32") as engine:
        poison(engine, x)
        report = fastres.verify(model, engine, [x], layerwise=True)
        assert report.passed, str(report)


@pytest.mark.skipif(INTERPRETING, reason="streams are a GPU's")
def test_map_copies_and_computes_on_streams(photo_batch: PhotoBatch) -> None:
    model = fastres.models.settle(fastres.models.cifar_resnet(8), photo_batch(16, 16))
    batches = [photo_batch(n, 16) for n in (4, 1, 3, 4, 2, 4)]
    with compile(model, batches[0], "fp16") as engine:
        expected = [engine(x.to(DEVICE)) for x in batches]
        mixed = [x if i % 2 else x.to(DEVICE) for i, x in enumerate(batches)]
        for _ in range(20):
            found = list(engine.map(iter(mixed), depth=3))
            assert all(torch.equal(y, z) for y, z in zip(found, expected, strict=True))
