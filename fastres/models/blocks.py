"""The residual blocks of the reference networks: basic, bottleneck and pre-activation.

Source: He et al. 2015 (arXiv:1512.03385), He et al. 2016 (arXiv:1603.05027),
Xie et al. 2017 (arXiv:1611.05431), Zagoruyko and Komodakis 2016 (arXiv:1605.07146).
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

Version = Literal["v1", "v1.5"]
Stem = Literal["imagenet", "cifar"]
Shortcut = Literal["A", "B", "C"]


@dataclass(frozen=True)
class BlockSpec:
    """What one residual block is built from; ``planes`` is its width before expansion."""

    in_channels: int
    planes: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    width_per_group: int = 64
    version: Version = "v1.5"
    shortcut: Shortcut = "B"


def conv1x1(c: int, k: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c, k, 1, stride, bias=False)


def conv3x3(c: int, k: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    # Padding equal to the dilation keeps H and W at stride 1.
    return nn.Conv2d(c, k, 3, stride, dilation, dilation, groups, bias=False)


class PaddedShortcut(nn.Module):
    """Shortcut A: subsample H and W, and pad the new channels with zeros on both sides.

    Source: He et al. 2015, section 3.3, option A.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, K, ceil(H/s), ceil(W/s)]
        if self.stride != 1:  # a slice of step 1 would be traced as an alias
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


def _shortcut(spec: BlockSpec, out_channels: int, *, norm: bool = True) -> nn.Module | None:
    """Build the shortcut of a block; None stands for the identity."""
    changes_shape = spec.stride != 1 or spec.in_channels != out_channels
    if spec.shortcut == "C" or (spec.shortcut == "B" and changes_shape):
        projection = nn.Sequential(conv1x1(spec.in_channels, out_channels, spec.stride))
        return projection.append(nn.BatchNorm2d(out_channels)) if norm else projection
    if changes_shape:
        return PaddedShortcut(spec.in_channels, out_channels, spec.stride)
    return None


# No ReLU below works in place: hooks must see what each layer itself returned.


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)).

    Source: He et al. 2015, figure 5 left.
    """

    expansion: ClassVar[int] = 1

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.conv1 = conv3x3(spec.in_channels, spec.planes, spec.stride)
        self.bn1 = nn.BatchNorm2d(spec.planes)
        self.relu = nn.ReLU()
        self.conv2 = conv3x3(spec.planes, spec.planes)
        self.bn2 = nn.BatchNorm2d(spec.planes)
        self.downsample = _shortcut(spec, spec.planes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(out + identity)
        return out


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3, 1x1 expand: y = relu(bn3(conv3(...)) + shortcut(x)), four times as wide.

    v1 strides in the first 1x1, v1.5 in the 3x3; the weights have the same shapes either way.

    Source: He et al. 2015, figure 5 right; groups: Xie et al. 2017; width: Zagoruyko 2016.
    """

    expansion: ClassVar[int] = 4

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        width = spec.planes * spec.width_per_group // 64 * spec.groups
        out_channels = spec.planes * self.expansion
        stride1, stride2 = (spec.stride, 1) if spec.version == "v1" else (1, spec.stride)
        self.conv1 = conv1x1(spec.in_channels, width, stride1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride2, spec.dilation, spec.groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(spec, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(out + identity)
        return out


class PreActBlock(nn.Module):
    """BN and ReLU before each 3x3: a = relu(bn1(x)); y = conv2(relu(bn2(conv1(a)))) + shortcut.

    The shortcut is x where it is the identity; where it changes the shape, it reads a.

    Source: He et al. 2016, figure 4e.
    """

    expansion: ClassVar[int] = 1

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(spec.in_channels)
        self.relu = nn.ReLU()
        self.conv1 = conv3x3(spec.in_channels, spec.planes, spec.stride)
        self.bn2 = nn.BatchNorm2d(spec.planes)
        self.conv2 = conv3x3(spec.planes, spec.planes)
        # The next block normalises the sum, so the projection carries no BN of its own.
        self.downsample = _shortcut(spec, spec.planes, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.bn1(x))
        identity = x if self.downsample is None else self.downsample(activated)
        out: Tensor = self.conv2(self.relu(self.bn2(self.conv1(activated)))) + identity
        return out


def stage(
    block: type[BasicBlock] | type[Bottleneck] | type[PreActBlock],
    first: BlockSpec,
    blocks: int,
    dilation: int = 1,
) -> nn.Sequential:
    """Chain ``first`` and ``blocks - 1`` further blocks of its width, those at stride 1."""
    wide = first.planes * block.expansion
    rest = replace(first, in_channels=wide, stride=1, dilation=dilation)
    return nn.Sequential(block(first), *(block(rest) for _ in range(blocks - 1)))
