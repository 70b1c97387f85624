"""Every network family that is promised, settled on photographs, against PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fastres
from fastres import models

PhotoBatch = Callable[[int, int], Tensor]


def headed(make: Callable[[], nn.Module]) -> nn.Module:
    """The head as transfer learning leaves it."""
    model = make()
    assert isinstance(model.fc, nn.Linear)
    width = model.fc.in_features
    model.fc = nn.Sequential(  # type: ignore[assignment]
        nn.Linear(width, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 5)
    )
    return model


@dataclass(frozen=True)
class Case:
    """A network and the side of the pictures that it is given."""

    name: str
    make: Callable[[], nn.Module]
    size: int = 64


def ours(name: str, **options: Any) -> Case:
    text = ", ".join(f"{k}={v}" for k, v in options.items())
    return Case(f"{name}({text})", lambda: getattr(models, name)(seed=0, **options))


def theirs(name: str, **options: Any) -> Case:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return getattr(torchvision.models, name)(**options)

    return Case(f"torchvision.{name}{'_dilated' if options else ''}", make)


CASES = (
    ours("resnet18"),
    ours("resnet34"),
    ours("resnet50", version="v1"),
    ours("resnet50", version="v1.5"),
    ours("resnet50", shortcut="A"),
    ours("resnet50", shortcut="C"),
    ours("resnet101", version="v1"),
    ours("resnext50_32x4d"),  # the wider and deeper ones: torchvision's, below
    ours("wide_resnet50_2"),
    Case("resnet18_cifar", lambda: models.resnet18(stem="cifar", num_classes=10, seed=0), 32),
    Case("cifar20_A", lambda: models.cifar_resnet(20, seed=0), 32),
    Case("cifar20_B", lambda: models.cifar_resnet(20, shortcut="B", seed=0), 32),
    Case("cifar20_C", lambda: models.cifar_resnet(20, shortcut="C", seed=0), 32),
    Case("cifar110", lambda: models.cifar_resnet(110, seed=0), 32),
    Case("preact20", lambda: models.preact_resnet(20, seed=0), 32),
    Case("preact56_A", lambda: models.preact_resnet(56, shortcut="A", seed=0), 32),
    theirs("resnet18"),
    theirs("resnet34"),
    theirs("resnet50"),
    theirs("resnet152"),
    theirs("resnext101_32x8d"),
    theirs("wide_resnet101_2"),
    theirs("resnet50", replace_stride_with_dilation=[False, True, True]),
    Case("head18", lambda: headed(lambda: models.resnet18(seed=0))),
    Case("head50", lambda: headed(lambda: torchvision.models.resnet50())),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity_in_fp32(case: Case, photo_batch: PhotoBatch) -> None:
    torch.manual_seed(0)
    model = models.settle(case.make(), photo_batch(16, case.size))
    x = photo_batch(2, case.size)
    with fastres.compile(model, x, backend="cpu") as engine:
        report = fastres.verify(model, engine, [x])
    assert report.passed, str(report)


BF16_CASES = [c for c in CASES if c.name.startswith(("resnet18", "cifar20", "preact20", "head18"))]


@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize("case", BF16_CASES, ids=lambda case: case.name)
def test_parity_in_bf16(case: Case, photo_batch: PhotoBatch) -> None:
    torch.manual_seed(0)
    model = models.settle(case.make(), photo_batch(16, case.size))
    x = photo_batch(4, case.size)
    with fastres.compile(model, x, backend="cpu", precision="bf16") as engine:
        report = fastres.verify(model, engine, [x])
    assert report.passed, str(report)


@pytest.mark.slow
def test_1202_layers(photo_batch: PhotoBatch) -> None:
    model = models.settle(models.cifar_resnet(1202, seed=0), photo_batch(16, 32))
    x = photo_batch(2, 32)
    with fastres.compile(model, x, backend="cpu") as engine:
        assert len(engine.graph.nodes) == 1208
        report = fastres.verify(model, engine, [x])
    assert report.passed, str(report)


@pytest.mark.parametrize("version", ["v1", "v1.5"])
def test_built_from_weights_alone(version: Any, photo_batch: PhotoBatch) -> None:
    """The builder's engine against the model that the weights come from."""
    model = models.settle(models.resnet50(version=version, seed=0), photo_batch(16, 64))
    x = photo_batch(2, 64)
    image = fastres.Input((2, 3, 64, 64))
    graph = fastres.build(model.state_dict(), version=version, inputs=image)
    with fastres.compile(graph, backend="cpu") as engine:
        report = fastres.verify(model, engine, [x])
        assert report.passed, str(report)
    other = "v1" if version == "v1.5" else "v1.5"
    wrong = fastres.build(model.state_dict(), version=other, inputs=image)
    with fastres.compile(wrong, backend="cpu") as engine:
        assert not fastres.verify(model, engine, [x]).passed
