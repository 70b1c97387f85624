"""ResNetSpec + state_dict → Graph: basic and bottleneck blocks assembled without the model's code.

The road beside `capture`: for the same network both give equal graphs, so each tests the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch

from fastres.errors import BuildError, GraphError
from fastres.graph import laws
from fastres.graph.architecture import Architecture, infer, usable
from fastres.graph.architecture import ResNetSpec as ResNetSpec
from fastres.graph.ir import (
    Activation,
    Add,
    BatchNorm,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Node,
    Op,
    Pad,
    Slice,
    Value,
)
from fastres.graph.names import Namer
from fastres.graph.shapes import node_shape
from fastres.graph.specs import DTYPE_NAMES, GIVEN_DTYPES, Dim, Shape, Sym, TensorSpec
from fastres.graph.trees import LEAF
from fastres.kernels.epilogue import ActivationKind
from fastres.options import Input
from fastres.wording import listed


def build_graph(
    weights: Mapping[str, torch.Tensor],
    spec: ResNetSpec,
    image: Input | None = None,
) -> Graph:
    """Assembles the graph of a residual network from torchvision-named weights.

    Args:
        weights: state_dict with names as `layer1.0.conv1.weight`; every entry must find its place.
        image: input shape; None takes (N, C, 224, 224), or 32 for the CIFAR stem.

    Raises:
        BuildError: a weight is missing, left over, misshapen or not finite, or the version or head
            must be said.
    """
    net = infer(weights, spec)
    stem = usable(weights, "conv1.weight")
    if stem.dim() != 4:
        raise BuildError(f"conv1.weight is {list(stem.shape)}, expected [K, C, R, S]")
    side = 224 if net.stem == "imagenet" else 32
    image = image or Input((1, stem.shape[1], side, side))
    if len(image.usual) != 4:
        raise BuildError(f"inputs is {list(image.usual)}; a picture is (N, C, H, W)")
    dtype = image.dtype or stem.dtype
    if dtype not in GIVEN_DTYPES or not dtype.is_floating_point:
        raise BuildError(f"inputs is {dtype}; the network takes floating-point pictures")
    sizes: list[Dim] = list(image.usual)
    for i in (0, *image.ranged):
        sizes[i] = Sym({0: "N", 2: "H", 3: "W"}[i])
    x = Value("x", TensorSpec(tuple(sizes), DTYPE_NAMES[dtype]))
    try:
        return laws.check(_Assembler(weights, net, x).assemble(), "build")
    except GraphError as error:
        raise BuildError(f"the weights do not fit together: {error}") from error


class _Assembler:
    """Emits nodes in the order in which a PyTorch model would run them."""

    def __init__(self, weights: Mapping[str, torch.Tensor], net: Architecture, x: Value) -> None:
        self.weights = weights
        self.net = net
        self.unused = {k for k in weights if not k.endswith("num_batches_tracked")}
        self.constants: dict[str, torch.Tensor] = {}
        self.namer = Namer((*weights, x.name))
        self.nodes: list[Node] = []
        self.input = x
        self.shapes: dict[str, Shape] = {x.name: x.spec.shape}
        # per kind of layer: the parameters that its first one may have, and those it has
        self.first_of: dict[str, tuple[dict[str, str], set[str]]] = {}

    def assemble(self) -> Graph:
        x = self.stem(self.input.name)
        dilation = 1
        for stage, depth in enumerate(self.net.depths):
            stride, first_dilation = (1 if stage == 0 else 2), dilation
            if stage > 0 and self.net.dilate[stage - 1]:
                dilation, stride = dilation * stride, 1
            for block in range(depth):
                name = f"layer{stage + 1}.{block}"
                x = self.block(
                    name, x, stride if block == 0 else 1, first_dilation if block == 0 else dilation
                )
        x = self.head(self.emit("avgpool", GlobalAvgPool(), x))
        if self.unused:
            raise BuildError(
                f"{len(self.unused)} weights have no place in this network: "
                f"{listed(sorted(self.unused))}. Was something added to the blocks?"
            )
        return Graph((self.input,), tuple(self.nodes), (x,), self.constants, LEAF)

    def stem(self, x: str) -> str:
        imagenet = self.net.stem == "imagenet"
        x = self.conv_bn("conv1", "bn1", x, stride=2 if imagenet else 1)
        x = self.emit("relu", Activation("relu"), x)
        return self.emit("maxpool", MaxPool((3, 3), (2, 2), (1, 1)), x) if imagenet else x

    def block(self, name: str, x: str, stride: int, dilation: int) -> str:
        strides: tuple[int, ...] = (stride, 1)
        dilations: tuple[int, ...] = (dilation, dilation)
        bottleneck = self.net.block == "bottleneck"
        if bottleneck:
            strides = (stride, 1, 1) if self.net.version == "v1" else (1, stride, 1)
            dilations = (1, dilation, 1)
        y = x
        for i, (s, d) in enumerate(zip(strides, dilations, strict=True), start=1):
            layer = (f"{name}.conv{i}", f"{name}.bn{i}")
            y = self.conv_bn(*layer, y, stride=s, dilation=d, grouped=bottleneck and i == 2)
            if i < len(strides):
                y = self.emit(f"{name}.relu", Activation("relu"), y)
        shortcut = self.shortcut(name, x, stride, self.shapes[y][1])
        y = self.emit(f"{name}.add", Add(), y, shortcut)
        return self.emit(f"{name}.relu", Activation("relu"), y)

    def shortcut(self, name: str, x: str, stride: int, channels: int | Sym) -> str:
        below = f"{name}.downsample"
        changes = stride > 1 or self.shapes[x][1] != channels
        if f"{below}.0.weight" in self.weights or (changes and self.net.projects):
            return self.conv_bn(f"{below}.0", f"{below}.1", x, stride=stride)
        if stride > 1:  # shortcut A: subsample, then pad the channels with zeros
            for dim in (2, 3):
                steps = [1, 1, 1, 1]
                steps[dim] = stride
                cut = Slice((0,) * 4, (None,) * 4, (steps[0], steps[1], steps[2], steps[3]))
                x = self.emit(f"{below}.slice", cut, x)
        have = self.shapes[x][1]
        assert isinstance(have, int) and isinstance(channels, int)
        if have > channels:
            raise BuildError(f"{name} narrows {have} channels to {channels} with no downsample.0")
        if have < channels:
            front = (channels - have) // 2
            pad = Pad((0, front, 0, 0), (0, channels - have - front, 0, 0))
            x = self.emit(f"{below}.pad", pad, x)
        return x

    def head(self, x: str) -> str:
        x = self.emit("flatten", Flatten(1), x)
        last = "fc"
        for entry in self.net.head:
            if entry in get_args(ActivationKind):
                x = self.emit(_after(last), Activation(entry), x)  # type: ignore[arg-type]
                continue
            if self.tensor(f"{entry}.weight").dim() != 2:
                raise BuildError(f"{entry} in head={self.net.head} is no Linear layer")
            last = entry
            params = {"weight": f"{entry}.weight", **self.optional(entry, bias=f"{entry}.bias")}
            x = self.emit(entry, Linear(), x, params=params)
        return x

    def conv_bn(
        self,
        conv: str,
        norm: str,
        x: str,
        *,
        stride: int = 1,
        dilation: int = 1,
        grouped: bool = False,
    ) -> str:
        weight = self.tensor(f"{conv}.weight")
        if weight.dim() != 4:
            raise BuildError(f"{conv}.weight is {list(weight.shape)}, expected [K, C, R, S]")
        channels = self.shapes[x][1]
        assert isinstance(channels, int)
        groups = channels // max(1, weight.shape[1])
        if groups * weight.shape[1] != channels or (groups > 1 and not grouped):
            raise BuildError(
                f"{conv}.weight is {list(weight.shape)}, but {channels} channels arrive there"
            )
        kernel = (weight.shape[2], weight.shape[3])
        padding = (dilation * (kernel[0] // 2), dilation * (kernel[1] // 2))
        op = Conv2d((stride, stride), padding, (dilation, dilation), groups)
        params = {"weight": f"{conv}.weight", **self.optional("convolution", bias=f"{conv}.bias")}
        x = self.emit(conv, op, x, params=params)
        params = self.optional("norm", weight=f"{norm}.weight", bias=f"{norm}.bias")
        params |= {"mean": f"{norm}.running_mean", "var": f"{norm}.running_var"}
        return self.emit(norm, BatchNorm(self.net.bn_eps), x, params=params)

    def optional(self, kind: str, **slots: str) -> dict[str, str]:
        """The parameters that are there: all layers of a kind have the same ones, or some got lost.

        Raises:
            BuildError: another layer of this kind has what this one has not, or the reverse.
        """
        found = {slot: name for slot, name in slots.items() if name in self.weights}
        theirs, had = self.first_of.setdefault(kind, (slots, set(found)))
        for slot in had ^ found.keys():
            there, missing = (theirs, slots) if slot in had else (slots, theirs)
            raise BuildError(f"{missing[slot]} is missing, though {there[slot]} is there")
        return found

    def emit(self, name: str, op: Op, *inputs: str, params: dict[str, str] | None = None) -> str:
        params = params or {}
        for constant in params.values():
            self.tensor(constant)
        draft = Node(
            self.namer.name(name), op, inputs, TensorSpec((), self.input.spec.dtype), params
        )
        view = Graph((), (), (), self.constants, LEAF)
        shape = node_shape(view, draft, self.shapes)
        node = draft.with_(spec=TensorSpec(shape, self.input.spec.dtype))
        self.nodes.append(node)
        self.shapes[node.name] = node.spec.shape
        return node.name

    def tensor(self, name: str) -> torch.Tensor:
        """A weight, which becomes a constant of the graph."""
        if name not in self.constants:
            self.constants[name] = usable(self.weights, name)
            self.unused.discard(name)
        return self.constants[name]


def _after(layer: str) -> str:
    """What stands behind a layer: in an nn.Sequential, the entry of the next number."""
    path, _, number = layer.rpartition(".")
    return f"{path}.{int(number) + 1}" if number.isdigit() else f"{layer}.activation"
