"""ResNet's own shapes, which are compiled and timed: layers, chains, convolutions by boxes."""

from dataclasses import dataclass

from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.geometry import ConvShape
from fastres.kernels.tiles.boxes import Projection
from fastres.kernels.tiles.chain import ChainShape


@dataclass(frozen=True)
class Layer:
    """A layer of a network, and what stands in its epilogue."""

    name: str
    size: int  # input height and width
    c: int
    k: int
    taps: int = 1
    stride: int = 1
    groups: int = 1
    merged: int = 1  # groups that are one product
    residual: bool = False
    activation: ActivationKind | None = "relu"

    def shape(self, batch: int) -> ConvShape:
        """Of a call for so many images; groups that are one product count as one."""
        stride, padding = (self.stride,) * 2, (self.taps // 2,) * 2
        taps, groups = (self.taps, self.taps), self.groups // self.merged
        sizes = (batch, self.size, self.size, self.c, self.k, *taps)
        return ConvShape(*sizes, stride, padding, groups=groups)


STEM = Layer("conv1", 224, 3, 64, taps=7, stride=2)
CONV_3X3 = Layer("layer1.0.conv2", 56, 64, 64, taps=3)
CONV_1X1 = Layer("layer4.1.conv3", 7, 512, 2048, residual=True)
CLASSIFIER = Layer("fc", 1, 2048, 1000, activation=None)
LAYERS = (
    STEM,
    CONV_3X3,
    Layer("layer1.0.conv3", 56, 64, 256, residual=True),
    Layer("layer2.0.conv2", 56, 128, 128, taps=3, stride=2),
    Layer("layer2.0.downsample.0", 56, 256, 512, stride=2, activation=None),
    Layer("layer3.1.conv1", 14, 1024, 256),
    Layer("layer4.1.conv2", 7, 512, 512, taps=3),
    CONV_1X1,
    Layer("resnext.layer1.0.conv2", 56, 128, 128, taps=3, groups=32),
    Layer("resnext.layer1.0.conv2.merged", 56, 128, 128, taps=3, groups=32, merged=8),
    CLASSIFIER,
)


CHAINS = {
    "layer1.0": ChainShape(0, 56, 56, 64, 256, 64, projected=64),
    "layer1.1": ChainShape(0, 56, 56, 64, 256, 64),
    "layer1.2": ChainShape(0, 56, 56, 64, 256, 128),
    "layer1.2-v1": ChainShape(0, 56, 56, 64, 256),
    "layer2.0": ChainShape(0, 56, 56, 128, 512, 128, projected=256, stride=2, shortcut_stride=2),
    "layer2.0-v1": ChainShape(0, 28, 28, 128, 512, 128, projected=256, shortcut_stride=2),
    "layer2.1": ChainShape(0, 28, 28, 128, 512, 128),
    "layer2.3": ChainShape(0, 28, 28, 128, 512, 256),
    "wide.layer1.1": ChainShape(0, 56, 56, 128, 256, 128),
}


@dataclass(frozen=True)
class Boxes:
    """A convolution through the copy engine, and what stands in its epilogue."""

    shape: ConvShape  # of batch 0
    projection: Projection | None = None
    residual: bool = False


def _boxes_of_stage(stage: int, mid: int, size: int, c: int, stride: int) -> dict[str, Boxes]:
    """The convolutions of one stage of ResNet-50 v1.5, without those that differ in depth only."""
    after, step = size // stride, (stride, stride)
    same, last = ((1, 1), (1, 1)), ConvShape(0, after, after, mid, 4 * mid, 1, 1)
    head = ConvShape(0, size, size, mid, mid, 3, 3, step, (1, 1))
    boxes = {f"layer{stage}.0.conv2": Boxes(head)} if stride > 1 else {}
    return boxes | {
        f"layer{stage}.0.conv3+downsample": Boxes(last, Projection(c, step)),
        f"layer{stage}.1.conv1": Boxes(ConvShape(0, after, after, 4 * mid, mid, 1, 1)),
        f"layer{stage}.1.conv2": Boxes(ConvShape(0, after, after, mid, mid, 3, 3, *same)),
        f"layer{stage}.1.conv3": Boxes(last, residual=True),
    }


BOXES = {
    **_boxes_of_stage(1, 64, 56, 64, 1),
    **_boxes_of_stage(2, 128, 56, 256, 2),
    **_boxes_of_stage(3, 256, 28, 512, 2),
    **_boxes_of_stage(4, 512, 14, 1024, 2),
}
