"""ResNetSpec + state_dict → Graph: basic and bottleneck blocks assembled without the model's code.

The road beside `capture`: for the same network both give equal graphs, so each tests the other.
What the weights show is read off them (block type, depth, widths, groups, stem, classes, shortcut
kind); what they do not show must be said, because v1 and v1.5 have identical weights and a wrong
guess is a silent loss of accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.utils._pytree as pytree

from fastres.errors import BuildError, GraphError
from fastres.graph import laws
from fastres.graph.capture import Namer
from fastres.graph.ir import (
    DTYPE_NAMES,
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
    Shape,
    Slice,
    Sym,
    TensorSpec,
    Value,
)
from fastres.graph.shapes import node_shape
from fastres.options import Input

Version = Literal["v1", "v1.5"]
_HEAD_ACTIVATIONS = ("relu", "silu", "sigmoid", "gelu", "hardswish")


@dataclass(frozen=True)
class ResNetSpec:
    """What a residual network is, beyond its weights; every field left None is inferred.

    Args:
        version: "v1" has the stride of a downsampling bottleneck in its first 1x1 convolution,
            "v1.5" in its 3x3. Needed for bottleneck nets: the weights are the same.
        stem: "imagenet" is 7x7 stride 2 and a 3x3 stride 2 max pool, "cifar" is 3x3 stride 1.
        dilate: per stage from the second on, stride traded for dilation (segmentation nets).
        bn_eps: epsilon of every BatchNorm (PyTorch 1e-5, Keras 1.001e-5).
        head: what follows the global average pool, as layer names and activations in order, such
            as ("fc.0", "relu", "fc.3"); needed if there is more than one Linear.
    """

    version: Version | None = None
    stem: Literal["imagenet", "cifar"] | None = None
    dilate: tuple[bool, ...] = (False, False, False)
    bn_eps: float = 1e-5
    head: tuple[str, ...] | None = None
    block: Literal["basic", "bottleneck"] = field(init=False, default="basic")
    depths: tuple[int, ...] = field(init=False, default=())


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
    spec = _infer(weights, spec)
    stem = weights["conv1.weight"]
    side = 224 if spec.stem == "imagenet" else 32
    image = image or Input((1, stem.shape[1], side, side))
    assembler = _Assembler(weights, spec, image)
    try:
        return laws.check(assembler.assemble(), "build")
    except GraphError as error:
        raise BuildError(f"the weights do not fit together: {error}") from error


def _infer(weights: Mapping[str, torch.Tensor], spec: ResNetSpec) -> ResNetSpec:
    """Fills in what the weights show; asks for the rest."""
    for name in ("conv1.weight", "layer1.0.conv1.weight"):
        if name not in weights:
            some = ", ".join(sorted(weights)[:4])
            raise BuildError(
                f"no {name} among {len(weights)} weights ({some}, ...): only torchvision's names "
                "are known (conv1, bn1, layer1.0.conv1, layer1.0.downsample.0, fc)"
            )
    depths: list[int] = []
    while f"layer{len(depths) + 1}.0.conv1.weight" in weights:
        stage = len(depths) + 1
        blocks = {
            int(m[1]) for key in weights if (m := re.match(rf"layer{stage}\.(\d+)\.conv1\.", key))
        }
        if blocks != set(range(len(blocks))):
            raise BuildError(f"layer{stage} has the blocks {sorted(blocks)}; some are missing")
        depths.append(len(blocks))
    bottleneck = "layer1.0.conv3.weight" in weights
    if bottleneck and spec.version not in ("v1", "v1.5"):
        raise BuildError(
            f"these are the weights of a bottleneck net of {sum(depths)} blocks, and version is "
            f"{spec.version!r}. v1 (stride in the first 1x1; the paper, Caffe, Keras) and v1.5 "
            "(stride in the 3x3; torchvision, timm, NVIDIA) have the same weights, so nothing here "
            "tells which it is: pass version='v1' or version='v1.5'"
        )
    kernel = tuple(weights["conv1.weight"].shape[2:])
    stems: dict[tuple[int, ...], Literal["imagenet", "cifar"]] = {
        (7, 7): "imagenet",
        (3, 3): "cifar",
    }
    if spec.stem is None and kernel not in stems:
        raise BuildError(f"conv1 is {kernel}; known stems are 7x7 (imagenet) and 3x3 (cifar)")
    if len(spec.dilate) < len(depths) - 1:
        raise BuildError(f"dilate={spec.dilate} needs {len(depths) - 1} entries, one per stage")
    filled = replace(spec, stem=spec.stem or stems[kernel], head=spec.head or _infer_head(weights))
    object.__setattr__(filled, "block", "bottleneck" if bottleneck else "basic")
    object.__setattr__(filled, "depths", tuple(depths))
    return filled


def _infer_head(weights: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    linears = sorted(
        key.removesuffix(".weight")
        for key, tensor in weights.items()
        if key.startswith("fc") and key.endswith(".weight") and tensor.dim() == 2
    )
    if len(linears) > 1:
        example = tuple(part for name in linears for part in (name, "relu"))[:-1]
        raise BuildError(
            f"the head has several Linear layers ({', '.join(linears)}) and the weights do not "
            f"show what stands between them: pass ResNetSpec(head={example!r}) or the like"
        )
    return tuple(linears)


class _Assembler:
    """Emits nodes in the order in which a PyTorch model would run them."""

    def __init__(self, weights: Mapping[str, torch.Tensor], spec: ResNetSpec, image: Input) -> None:
        self.weights = weights
        self.spec = spec
        self.unused = {k for k in weights if not k.endswith("num_batches_tracked")}
        self.constants: dict[str, torch.Tensor] = {}
        self.namer = Namer()
        self.nodes: list[Node] = []
        dims: list[int | Sym] = list(image.usual)
        for i in (0, *image.ranged):
            dims[i] = Sym({0: "N", 2: "H", 3: "W"}[i])
        self.dtype = DTYPE_NAMES[image.dtype or weights["conv1.weight"].dtype]
        self.input = Value(self.namer.name("x"), TensorSpec(tuple(dims), self.dtype))
        self.shapes: dict[str, Shape] = {"x": self.input.spec.shape}

    def assemble(self) -> Graph:
        spec = self.spec
        x = self.stem("x")
        dilation = 1
        for stage, depth in enumerate(spec.depths):
            stride, first_dilation = (1 if stage == 0 else 2), dilation
            if stage > 0 and spec.dilate[stage - 1]:
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
                f"{', '.join(sorted(self.unused)[:5])}. Was something added to the blocks?"
            )
        tree = pytree.treespec_dumps(pytree.tree_structure(0))
        return Graph((self.input,), tuple(self.nodes), (x,), self.constants, tree)

    def stem(self, x: str) -> str:
        imagenet = self.spec.stem == "imagenet"
        x = self.conv_bn("conv1", "bn1", x, stride=2 if imagenet else 1)
        x = self.emit("relu", Activation("relu"), x)
        return self.emit("maxpool", MaxPool((3, 3), (2, 2), (1, 1)), x) if imagenet else x

    def block(self, name: str, x: str, stride: int, dilation: int) -> str:
        strides: tuple[int, ...] = (stride, 1)
        dilations: tuple[int, ...] = (dilation, dilation)
        if self.spec.block == "bottleneck":
            strides = (stride, 1, 1) if self.spec.version == "v1" else (1, stride, 1)
            dilations = (1, dilation, 1)
        y = x
        for i, (s, d) in enumerate(zip(strides, dilations, strict=True), start=1):
            y = self.conv_bn(f"{name}.conv{i}", f"{name}.bn{i}", y, stride=s, dilation=d)
            if i < len(strides):
                y = self.emit(f"{name}.relu", Activation("relu"), y)
        shortcut = self.shortcut(name, x, stride, self.shapes[y][1])
        y = self.emit(f"{name}.add", Add(), y, shortcut)
        return self.emit(f"{name}.relu", Activation("relu"), y)

    def shortcut(self, name: str, x: str, stride: int, channels: int | Sym) -> str:
        if f"{name}.downsample.0.weight" in self.weights:
            below = f"{name}.downsample"
            return self.conv_bn(f"{below}.0", f"{below}.1", x, stride=stride)
        if stride > 1:  # shortcut A: subsample, then pad the channels with zeros
            for dim in (2, 3):
                steps = [1, 1, 1, 1]
                steps[dim] = stride
                cut = Slice((0,) * 4, (None,) * 4, (steps[0], steps[1], steps[2], steps[3]))
                x = self.emit(f"{name}.downsample.slice", cut, x)
        have = self.shapes[x][1]
        assert isinstance(have, int) and isinstance(channels, int)
        if have > channels:
            raise BuildError(f"{name} narrows {have} channels to {channels} with no downsample.0")
        if have < channels:
            front = (channels - have) // 2
            pad = Pad((0, front, 0, 0), (0, channels - have - front, 0, 0))
            x = self.emit(f"{name}.downsample.pad", pad, x)
        return x

    def head(self, x: str) -> str:
        x = self.emit("flatten", Flatten(1), x)
        for entry in self.spec.head or ():
            if entry in _HEAD_ACTIVATIONS:
                x = self.emit("fc.activation", Activation(entry), x)  # type: ignore[arg-type]
                continue
            if self.tensor(f"{entry}.weight").dim() != 2:
                raise BuildError(f"{entry} in head={self.spec.head} is no Linear layer")
            params = {"weight": f"{entry}.weight", **self.optional(bias=f"{entry}.bias")}
            x = self.emit(entry, Linear(), x, params=params)
        return x

    def conv_bn(self, conv: str, norm: str, x: str, *, stride: int = 1, dilation: int = 1) -> str:
        weight = self.tensor(f"{conv}.weight")
        if weight.dim() != 4:
            raise BuildError(f"{conv}.weight is {list(weight.shape)}, expected [K, C, R, S]")
        channels = self.shapes[x][1]
        assert isinstance(channels, int)
        if weight.shape[1] < 1 or channels % weight.shape[1]:
            raise BuildError(
                f"{conv}.weight is {list(weight.shape)}, but {channels} channels arrive there"
            )
        kernel = (weight.shape[2], weight.shape[3])
        padding = (dilation * (kernel[0] // 2), dilation * (kernel[1] // 2))
        op = Conv2d((stride, stride), padding, (dilation, dilation), channels // weight.shape[1])
        params = {"weight": f"{conv}.weight", **self.optional(bias=f"{conv}.bias")}
        x = self.emit(conv, op, x, params=params)
        params = self.optional(weight=f"{norm}.weight", bias=f"{norm}.bias")
        params |= {"mean": f"{norm}.running_mean", "var": f"{norm}.running_var"}
        return self.emit(norm, BatchNorm(self.spec.bn_eps), x, params=params)

    def optional(self, **slots: str) -> dict[str, str]:
        return {slot: name for slot, name in slots.items() if name in self.weights}

    def emit(self, name: str, op: Op, *inputs: str, params: dict[str, str] | None = None) -> str:
        params = params or {}
        for constant in params.values():
            self.constants[constant] = self.tensor(constant)
        draft = Node(self.namer.name(name), op, inputs, TensorSpec((), self.dtype), params)
        view = Graph((), (), (), self.constants, "")
        node = draft.with_(spec=TensorSpec(node_shape(view, draft, self.shapes), self.dtype))
        self.nodes.append(node)
        self.shapes[node.name] = node.spec.shape
        return node.name

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self.weights:
            raise BuildError(f"the weight {name} is missing")
        tensor = self.weights[name]
        self.unused.discard(name)
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise BuildError(f"{name} is not a floating-point tensor")
        if not torch.isfinite(tensor).all():
            raise BuildError(f"{name} {list(tensor.shape)} holds NaN or infinite values")
        return tensor.detach().cpu()
