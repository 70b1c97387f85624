"""build_graph refuses weights, specs and pictures that do not fit, and says what it found where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastres import models
from fastres.errors import BuildError
from fastres.graph.builder import ResNetSpec, build_graph
from fastres.options import Input


def narrow() -> nn.Module:
    return models.ResNet(models.Bottleneck, (1, 1, 1, 1), planes=8, num_classes=5, seed=0)


def weights_of(model: nn.Module | None = None) -> dict[str, Tensor]:
    return dict((model or models.cifar_resnet(8, shortcut="B", seed=0)).state_dict())


def with_(**changes: object) -> dict[str, Any]:
    """A small network's weights, some replaced, or left out where None."""
    weights = {**weights_of(), **{k.replace("__", "."): v for k, v in changes.items()}}
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def renamed(old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in weights_of().items()}


basic, any_spec = ResNetSpec(), ResNetSpec("v1.5")
REFUSED: dict[str, tuple[Callable[[], Mapping[str, Any]], ResNetSpec, str]] = {
    "no version": (
        lambda: weights_of(narrow()),
        basic,
        "bottleneck net of 4 blocks.*pass version='v1' or version='v1.5'",
    ),
    "another version": (weights_of, ResNetSpec("2"), "version is '2'; known are 'v1', 'v1.5'"),  # type: ignore[arg-type]
    "another stem": (weights_of, ResNetSpec(stem="deep"), "stem is 'deep'; known are"),  # type: ignore[arg-type]
    "nothing": (dict, any_spec, r"no conv1.weight among 0 weights \(none\)"),
    "names of DataParallel": (
        lambda: {f"module.{k}": v for k, v in weights_of().items()},
        any_spec,
        r"no conv1.weight among \d+ weights \(module.bn1.bias, .*torchvision's names",
    ),
    "names of timm's deep stem": (
        lambda: renamed("conv1.weight", "conv1.0.weight"),
        any_spec,
        "no conv1.weight among",
    ),
    "names that are numbers": (lambda: {0: zeros(1)}, any_spec, "weights holds the name 0"),
    "no stages": (lambda: renamed("layer1", "stage1"), any_spec, "no layer1.0.conv1.weight"),
    "an unknown stem": (
        lambda: with_(conv1__weight=zeros(16, 3, 5, 5)),
        any_spec,
        r"conv1 is \(5, 5\); known stems",
    ),
    "a missing block": (
        lambda: renamed("layer2.0", "layer2.1"),
        any_spec,
        r"layer2 has the blocks \[1\]; some are missing",
    ),
    "a missing stage": (
        lambda: renamed("layer2", "layer4"),
        any_spec,
        r"stages layer\[1, 3, 4\]; some are missing",
    ),
    "a missing weight": (
        lambda: with_(layer2__0__conv2__weight=None),
        any_spec,
        "the weight layer2.0.conv2.weight is missing",
    ),
    "missing statistics": (
        lambda: with_(bn1__running_var=None),
        any_spec,
        "the weight bn1.running_var is missing",
    ),
    "a missing projection": (
        lambda: {k: v for k, v in weights_of().items() if "layer3.0.downsample" not in k},
        any_spec,
        "the weight layer3.0.downsample.0.weight is missing",
    ),
    "a stage too many": (
        lambda: with_(layer4__0__conv4__weight=zeros(1, 1, 1, 1)),
        any_spec,
        "1 weights have no place in this network: layer4.0.conv4.weight",
    ),
    "a squeeze": (
        lambda: with_(layer1__0__se__weight=zeros(1), layer1__0__se__bias=zeros(1)),
        any_spec,
        "2 weights have no place in this network: layer1.0.se.bias, layer1.0.se.weight",
    ),
    "fewer channels": (
        lambda: with_(layer2__0__conv1__weight=zeros(32, 8, 3, 3)),
        any_spec,
        r"layer2.0.conv1.weight is \[32, 8, 3, 3\], but 16 channels arrive there",
    ),
    "more channels": (
        lambda: with_(layer2__0__conv1__weight=zeros(32, 32, 3, 3)),
        any_spec,
        "but 16 channels arrive there",
    ),
    "no channels": (lambda: with_(conv1__weight=zeros(16, 0, 3, 3)), any_spec, "is empty"),
    "a vector for a convolution": (
        lambda: with_(layer1__0__conv1__weight=zeros(16)),
        any_spec,
        r"layer1.0.conv1.weight is \[16\], expected \[K, C, R, S\]",
    ),
    "a vector for the stem": (
        lambda: with_(conv1__weight=zeros(16)),
        any_spec,
        r"conv1 is \(\); known stems",
    ),
    "a vector for a said stem": (
        lambda: with_(conv1__weight=zeros(16)),
        ResNetSpec(stem="cifar"),
        r"conv1.weight is \[16\], expected",
    ),
    "a misshapen norm": (
        lambda: with_(bn1__weight=zeros(3)),
        any_spec,
        "the weights do not fit together: bn1: .* one value per channel",
    ),
    "a misshapen bias": (
        lambda: with_(fc__bias=zeros(3)),
        any_spec,
        "the weights do not fit together: fc: .* one value per channel",
    ),
    "a misshapen head": (
        lambda: with_(fc__weight=zeros(10, 63)),
        any_spec,
        "the weights do not fit together: fc: .* needs 63 features",
    ),
    "a sum of two widths": (
        lambda: with_(layer1__0__conv2__weight=zeros(8, 16, 3, 3)),
        any_spec,
        "the weights do not fit together: layer1.0.bn2",
    ),
    "NaN": (
        lambda: with_(layer1__0__bn1__bias=torch.full((16,), float("nan"))),
        any_spec,
        r"layer1.0.bn1.bias \[16\] holds NaN or infinite",
    ),
    "infinity": (lambda: with_(fc__bias=zeros(10) - float("inf")), any_spec, "fc.bias .* infinite"),
    "integers": (
        lambda: with_(conv1__weight=zeros(16, 3, 3, 3, dtype=torch.int8)),
        any_spec,
        "conv1.weight is torch.int8, not a floating-point tensor",
    ),
    "no tensor": (
        lambda: with_(fc__bias=[0.0] * 10),
        any_spec,
        "fc.bias is list, not a dense floating",
    ),
    "meta": (
        lambda: {k: v.to("meta") for k, v in weights_of().items()},
        any_spec,
        "conv1.weight is on the meta device",
    ),
    "dilation of a basic net": (
        weights_of,
        ResNetSpec(dilate=(False, True, False)),
        "only bottleneck nets are dilated",
    ),
    "dilation of too few stages": (
        lambda: weights_of(narrow()),
        ResNetSpec("v1", dilate=(True,)),
        r"dilate=\(True,\) needs 3 entries",
    ),
    "dilation of a stage that is not there": (
        lambda: weights_of(narrow()),
        ResNetSpec("v1", dilate=(False, False, False, True)),
        "needs 3 entries",
    ),
    "pre-activation": (
        lambda: weights_of(models.preact_resnet(8, seed=0)),
        any_spec,
        "the weight bn1.running_mean is missing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    weights, spec, message = REFUSED[name]
    with pytest.raises(BuildError, match=message):
        build_graph(weights(), spec)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Input((1, 10)), r"inputs is \[1, 10\]; a picture is"),
        (Input((1, 1, 32, 32)), "but 1 channels arrive there"),
        (Input((1, 6, 32, 32)), "but 6 channels arrive there"),
        (Input((1, 3, 32, 32), dtype=torch.uint8), "takes floating-point pictures"),
        (Input((1, 3, 32, 32), dtype=torch.complex64), "takes floating-point pictures"),
    ],
    ids=["rank", "grey", "six channels", "bytes", "complex"],
)
def test_refuses_pictures(image: Input, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        build_graph(weights_of(), ResNetSpec(), image)


@pytest.mark.parametrize("lost", ["layer2.0.bn1.bias", "bn1.bias", "layer3.0.bn2.weight"])
def test_a_parameter_that_got_lost(lost: str) -> None:
    weights = dict(models.cifar_resnet(8).state_dict())
    del weights[lost]
    with pytest.raises(BuildError, match="is missing, though"):
        build_graph(weights, ResNetSpec(), None)
