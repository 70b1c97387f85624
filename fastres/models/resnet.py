"""Reference ResNets: the networks whose meaning every compiled engine is checked against.

Layers carry torchvision's names, so a torchvision ``state_dict`` loads strictly.

Source: He et al. 2015 (arXiv:1512.03385), He et al. 2016 (arXiv:1603.05027),
Xie et al. 2017 (arXiv:1611.05431), Zagoruyko and Komodakis 2016 (arXiv:1605.07146).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict, Unpack, get_args

import torch
from torch import Tensor, nn

from fastres.models.blocks import (
    BasicBlock,
    BlockSpec,
    Bottleneck,
    PreActBlock,
    Shortcut,
    Stem,
    Version,
    conv3x3,
    stage,
)


class Options(TypedDict, total=False):
    """Keywords of every ImageNet network; ``ResNet`` says what each means."""

    version: Version
    num_classes: int
    shortcut: Shortcut
    stem: Stem
    replace_stride_with_dilation: Sequence[bool]
    seed: int | None


class ResNet(nn.Module):
    """Stem, three or four stages of residual blocks, global average pool, linear head.

    Each stage after the first halves H and W and doubles the width.
    Input [N, 3, H, W], output [N, num_classes], both in the parameters' dtype.

    Args:
        block: BasicBlock or Bottleneck.
        layers: blocks in each stage: three stages or four.
        version: "v1" strides in a bottleneck's first 1x1, "v1.5" in its 3x3; basic blocks offer
            no such choice, so there both mean the same network.
        num_classes: rows of the linear head.
        shortcut: "A" pads with zeros, "B" projects where the shape changes, "C" projects always.
        stem: "imagenet" is a 7x7 stride-2 convolution and a max pool, "cifar" one 3x3 convolution.
        planes: width of the first stage.
        groups: groups of a bottleneck's 3x3 convolution.
        width_per_group: width of that convolution, per group and 64 planes.
        replace_stride_with_dilation: one flag each for layer2, layer3 and layer4: dilate the 3x3
            convolutions instead of halving H and W (bottlenecks only).
        seed: seed of the initial weights; without it they come from torch's global generator.

    Raises:
        ValueError: an argument is unknown or out of range.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        *,
        version: Version = "v1.5",
        num_classes: int = 1000,
        shortcut: Shortcut = "B",
        stem: Stem = "imagenet",
        planes: int = 64,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] = (False, False, False),
        seed: int | None = None,
    ) -> None:
        super().__init__()
        _require("version", version, get_args(Version))
        _require("shortcut", shortcut, get_args(Shortcut))
        _require("stem", stem, get_args(Stem))
        _require_classes(num_classes)
        dilate = tuple(replace_stride_with_dilation)
        if len(layers) not in (3, 4) or min(layers) < 1:
            raise ValueError(f"layers must be 3 or 4 counts of at least 1, got {tuple(layers)}")
        if len(dilate) != 3:
            raise ValueError(f"replace_stride_with_dilation must be 3 flags, got {dilate}")
        if block is BasicBlock and (any(dilate) or groups != 1 or width_per_group != 64):
            raise ValueError(
                "basic blocks support no dilation, groups=1 and width_per_group=64; got "
                f"replace_stride_with_dilation={dilate}, {groups=}, {width_per_group=}"
            )

        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, planes, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = conv3x3(3, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()

        common = BlockSpec(
            planes, planes, 1, 1, groups, width_per_group, version=version, shortcut=shortcut
        )
        stages = [stage(block, common, layers[0])]
        in_channels, dilation = planes * block.expansion, 1
        for blocks, dilated in zip(layers[1:], dilate, strict=False):
            planes *= 2
            # A dilated stage's first block still reads with the dilation of the stage before.
            first = replace(
                common,
                in_channels=in_channels,
                planes=planes,
                stride=1 if dilated else 2,
                dilation=dilation,
            )
            dilation *= 2 if dilated else 1
            stages.append(stage(block, first, blocks, dilation))
            in_channels = planes * block.expansion
        self.layer1, self.layer2, self.layer3 = stages[:3]
        # A three-stage network ends at layer3; an empty stage lets all share one forward.
        self.layer4 = stages[3] if len(stages) == 4 else nn.Sequential()
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(in_channels, num_classes)
        _initialise(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


class PreActResNet(nn.Module):
    """Pre-activation network for small pictures: 3x3 stem, three stages, BN, ReLU, pool, head.

    Input [N, 3, H, W], output [N, num_classes], both in the parameters' dtype.

    Args:
        blocks: residual blocks in each stage.
        num_classes, shortcut, seed: as for ResNet.

    Raises:
        ValueError: an argument is unknown or out of range.

    Source: He et al. 2016, figure 4e and appendix.
    """

    def __init__(
        self, blocks: int, num_classes: int = 10, shortcut: Shortcut = "B", seed: int | None = None
    ) -> None:
        super().__init__()
        _require("shortcut", shortcut, get_args(Shortcut))
        _require_classes(num_classes)
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        self.conv1 = conv3x3(3, 16)
        self.layer1 = stage(PreActBlock, BlockSpec(16, 16, shortcut=shortcut), blocks)
        self.layer2 = stage(PreActBlock, BlockSpec(16, 32, 2, shortcut=shortcut), blocks)
        self.layer3 = stage(PreActBlock, BlockSpec(32, 64, 2, shortcut=shortcut), blocks)
        self.bn = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        _initialise(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.relu(self.bn(x))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def resnet18(**options: Unpack[Options]) -> ResNet:
    """ResNet-18: basic blocks 2-2-2-2, 11.7 M parameters."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options: Unpack[Options]) -> ResNet:
    """ResNet-34: basic blocks 3-4-6-3, 21.8 M parameters."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options: Unpack[Options]) -> ResNet:
    """ResNet-50: bottlenecks 3-4-6-3, 25.6 M parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def resnet101(**options: Unpack[Options]) -> ResNet:
    """ResNet-101: bottlenecks 3-4-23-3, 44.5 M parameters."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)


def resnet152(**options: Unpack[Options]) -> ResNet:
    """ResNet-152: bottlenecks 3-8-36-3, 60.2 M parameters."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **options)


def resnext50_32x4d(**options: Unpack[Options]) -> ResNet:
    """ResNeXt-50: ResNet-50 whose 3x3 has 32 groups of 4, 25.0 M parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4, **options)


def resnext101_32x8d(**options: Unpack[Options]) -> ResNet:
    """ResNeXt-101: ResNet-101 whose 3x3 has 32 groups of 8, 88.8 M parameters."""
    return ResNet(Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8, **options)


def wide_resnet50_2(**options: Unpack[Options]) -> ResNet:
    """Wide ResNet-50-2: ResNet-50 whose 3x3 is twice as wide, 68.9 M parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), width_per_group=128, **options)


def wide_resnet101_2(**options: Unpack[Options]) -> ResNet:
    """Wide ResNet-101-2: ResNet-101 whose 3x3 is twice as wide, 126.9 M parameters."""
    return ResNet(Bottleneck, (3, 4, 23, 3), width_per_group=128, **options)


def cifar_resnet(
    depth: int,
    num_classes: int = 10,
    shortcut: Shortcut = "A",
    version: Version = "v1.5",
    seed: int | None = None,
) -> ResNet:
    """Network of 6n + 2 layers for 32x32 pictures: n basic blocks each of width 16, 32 and 64.

    Args:
        depth: 20, 32, 44, 56, 110 and 1202 are the paper's.
        num_classes, shortcut, version, seed: as for ResNet.

    Raises:
        ValueError: depth is not 6n + 2, or another argument is unknown or out of range.

    Source: He et al. 2015, section 4.2.
    """
    return ResNet(
        BasicBlock,
        (_blocks_per_stage(depth),) * 3,
        version=version,
        num_classes=num_classes,
        shortcut=shortcut,
        stem="cifar",
        planes=16,
        seed=seed,
    )


def preact_resnet(
    depth: int, num_classes: int = 10, shortcut: Shortcut = "B", seed: int | None = None
) -> PreActResNet:
    """Pre-activation network of 6n + 2 layers for 32x32 pictures; arguments as cifar_resnet's."""
    return PreActResNet(_blocks_per_stage(depth), num_classes, shortcut, seed)


def _blocks_per_stage(depth: int) -> int:
    if depth < 8 or depth % 6 != 2:
        raise ValueError(
            f"depth must be 6n + 2 with n at least 1 (20, 32, 44, 56, 110, 1202, ...), got {depth}"
        )
    return (depth - 2) // 6


def _require(name: str, value: str, supported: tuple[str, ...]) -> None:
    if value not in supported:
        raise ValueError(f"unknown {name} {value!r}; supported: {', '.join(supported)}")


def _require_classes(num_classes: int) -> None:
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")


def _initialise(model: nn.Module, seed: int | None) -> None:
    """Draw convolutions from N(0, 2 / (K R S)) and the head from U[-1/sqrt(C), 1/sqrt(C)].

    BatchNorm keeps its own start: gamma 1, beta 0, mean 0, variance 1.

    Source: He et al. 2015, *Delving Deep into Rectifiers* (arXiv:1502.01852), fan-out form.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode="fan_out", nonlinearity="relu", generator=generator
            )
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)
