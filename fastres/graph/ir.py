"""The intermediate representation: a closed set of operations in a flat, single-assignment graph.

Everything here is frozen. A `Graph` is rewritten by building a new one (`fastres.graph.passes`),
its laws are in `fastres.graph.laws`, its sizes in `fastres.graph.shapes`. The structs are msgspec
structs, so the same definitions are the strict JSON schema of a saved engine.

Activations are logically NCHW, weights as PyTorch keeps them (KCRS for a convolution); physical
layout is a matter for a backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from dataclasses import replace as _replace
from functools import cached_property
from typing import Any

import msgspec
import torch
from torch.utils._pytree import TreeSpec

from fastres.calib.images import Preprocess
from fastres.graph.specs import TensorSpec, spec_of, widest
from fastres.kernels.epilogue import ActivationKind, Epilogue
from fastres.kernels.geometry import Pair
from fastres.wording import one_line


class Conv2d(msgspec.Struct, frozen=True, tag=True):
    """y = epilogue(x * weight + bias); params weight [K, C/groups, R, S] and maybe bias [K].

    With `epilogue.residual` the node has a second input of the output's shape. With a parameter
    scale [K] the weight is quantised and stands for weight * scale.
    """

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    epilogue: Epilogue = Epilogue()


class Normalize(msgspec.Struct, frozen=True, tag=True):
    """y = (x * scale - mean) / std per channel, of decoded pictures; with `flip`, from BGR to RGB
    or back before.

    Reads a graph input, uint8 [N, 3, H, W], that nothing else reads. Whoever runs the graph lays
    it out as pictures are decoded: pixel by pixel, a view of [N, H, W, 3].
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: float = 1 / 255
    flip: bool = False

    @classmethod
    def of(cls, preprocess: Preprocess) -> Normalize:
        """What a Preprocess does after decoding, resizing and cropping."""
        flip = preprocess.channels == "BGR"
        return cls(preprocess.mean, preprocess.std, preprocess.scale, flip)

    @property
    def factors(self) -> tuple[list[float], list[float]]:
        """a and b of y = a * x + b, by channel."""
        pairs = list(zip(self.mean, self.std, strict=True))
        return [self.scale / std for _, std in pairs], [-mean / std for mean, std in pairs]


class BatchNorm(msgspec.Struct, frozen=True, tag=True):
    """y = act(weight * (x - mean) / sqrt(var + eps) + bias), per channel, running statistics.

    Params mean, var [C], and weight, bias [C] where the layer is affine.
    """

    eps: float = 1e-5
    activation: ActivationKind | None = None


class Activation(msgspec.Struct, frozen=True, tag=True):
    """y = act(x), elementwise."""

    kind: ActivationKind


class Add(msgspec.Struct, frozen=True, tag=True):
    """y = act(a + b), with broadcasting."""

    activation: ActivationKind | None = None


class Mul(msgspec.Struct, frozen=True, tag=True):
    """y = a * b, with broadcasting."""


class MaxPool(msgspec.Struct, frozen=True, tag=True):
    """y = maximum over each window; padding counts as minus infinity."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False


class AvgPool(msgspec.Struct, frozen=True, tag=True):
    """y = mean over each window."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True


class GlobalAvgPool(msgspec.Struct, frozen=True, tag=True):
    """y = mean over H and W; [N, C, H, W] to [N, C, 1, 1], or [N, C] without `keepdim`."""

    keepdim: bool = True


class Linear(msgspec.Struct, frozen=True, tag=True):
    """y = act(x @ weight.T + bias); params weight [K, C] and maybe bias [K].

    With a parameter scale [K] the weight is quantised and stands for weight * scale.
    """

    activation: ActivationKind | None = None


class Flatten(msgspec.Struct, frozen=True, tag=True):
    """Joins all dimensions from `start_dim` on."""

    start_dim: int = 1


class Concat(msgspec.Struct, frozen=True, tag=True):
    """Joins any number of inputs along `dim`."""

    dim: int = 1


class Pad(msgspec.Struct, frozen=True, tag=True):
    """Adds `before[i]` and `after[i]` elements of `value` to dimension i."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    value: float = 0.0


class Slice(msgspec.Struct, frozen=True, tag=True):
    """x[start:stop:step] in every dimension; a stop of None is the end."""

    starts: tuple[int, ...]
    stops: tuple[int | None, ...]
    steps: tuple[int, ...]


class Softmax(msgspec.Struct, frozen=True, tag=True):
    """y = exp(x) / sum(exp(x)) along `dim`."""

    dim: int = -1


class Quantize(msgspec.Struct, frozen=True, tag=True):
    """q = x / scale, rounded half to even and saturated: 8 bits with zero point 0, or fp8 e4m3.

    int8 saturates at -128 and 127, uint8 at 0 and 255, e4m3 at -448 and 448; the node's spec says
    which it is.
    """

    scale: float


class Dequantize(msgspec.Struct, frozen=True, tag=True):
    """y = q * scale of a quantised value."""

    scale: float


class Aten(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """An operation the IR does not know, kept with its overload so that PyTorch can run it.

    `args` and `kwargs` are JSON of the call, with {"input": i} where the i-th input stands (see
    `fastres.graph.aten`). `result` is what the exporter found: nobody else knows the shape. Of a
    call with several results it is that of number `index`, for which the node stands.
    """

    overload: str
    args: str
    kwargs: str
    result: TensorSpec
    index: int | None = None


Op = (
    Conv2d
    | Normalize
    | BatchNorm
    | Activation
    | Add
    | Mul
    | MaxPool
    | AvgPool
    | GlobalAvgPool
    | Linear
    | Flatten
    | Concat
    | Pad
    | Slice
    | Softmax
    | Quantize
    | Dequantize
    | Aten
)


class Value(msgspec.Struct, frozen=True):
    """A named tensor that enters the graph."""

    name: str
    spec: TensorSpec


class Node(msgspec.Struct, frozen=True):
    """One operation: `inputs` name earlier values, `params` map a slot (weight, bias, mean, var)
    to a constant. Until `fold_constants`, also to a value that is computed of constants alone.

    `origin` names the captured operations this node now stands for, in order; its value is the
    value of the last of them in the original model. Empty means just the node itself.
    """

    name: str
    op: Op
    inputs: tuple[str, ...]
    spec: TensorSpec
    params: dict[str, str] = {}
    origin: tuple[str, ...] = ()

    @property
    def origins(self) -> tuple[str, ...]:
        return self.origin or (self.name,)

    def with_(self, **changes: Any) -> Node:
        return msgspec.structs.replace(self, **changes)


@dataclass(frozen=True, eq=False)
class Graph:
    """A network: inputs, nodes in execution order, outputs, and the constants they name.

    `output_tree` is what the model returns: PyTorch's tree of it, with one leaf per output.
    """

    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, torch.Tensor]
    output_tree: TreeSpec
    _index: dict[str, Node] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {node.name: node for node in self.nodes})

    def __getitem__(self, name: str) -> Node:
        return self._index[name]

    def __contains__(self, name: str) -> bool:
        return name in self._index

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def replace(self, **changes: Any) -> Graph:
        return _replace(self, **changes)

    def spec(self, name: str) -> TensorSpec:
        """The spec of any value: a graph input, a node's result, or a constant."""
        if name in self._index:
            return self._index[name].spec
        if name in self.constants:
            return spec_of(self.constants[name])
        for value in self.inputs:
            if value.name == name:
                return value.spec
        raise KeyError(name)

    @property
    def floating_dtype(self) -> torch.dtype:
        """What the network computes in: the widest dtype that its layers with weights give.

        Some layers in fp16 or bf16 among others in fp32 lose nothing in fp32. Where there are no
        layers it is the constants' dtype, or the inputs'.
        """
        layers = widest(node.spec.torch_dtype for node in self.nodes if node.params)
        constants = widest(tensor.dtype for tensor in self.constants.values())
        inputs = widest(value.spec.torch_dtype for value in self.inputs)
        return layers or constants or inputs or torch.float32

    @cached_property
    def normalize(self) -> Node | None:
        """The node that normalises decoded pictures; None where the model is fed as it was."""
        return next((node for node in self.nodes if isinstance(node.op, Normalize)), None)

    @property
    def taken_as_weights(self) -> set[str]:
        """What layers take as their weights, biases, statistics and scales."""
        return {name for node in self.nodes for name in node.params.values()}

    def users(self) -> dict[str, list[Node]]:
        """Which nodes read each value; a graph output is not a user (see `outputs`)."""
        users: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                users.setdefault(name, []).append(node)
        return users

    def sole_user(self, users: Mapping[str, list[Node]], name: str) -> Node | None:
        """The one node that reads `name`; None if several do, or if the model returns it."""
        if name in self.outputs or len(users.get(name, ())) != 1:
            return None
        return users[name][0]

    def structure(self) -> tuple[Any, ...]:
        """Everything but the numbers, comparable with ==."""
        specs = {name: str(spec_of(t)) for name, t in self.constants.items()}
        return self.inputs, self.nodes, self.outputs, self.output_tree, specs

    def equals(self, other: Graph) -> bool:
        """Same structure and equal constants."""
        return self.structure() == other.structure() and all(
            torch.equal(tensor, other.constants[name]) for name, tensor in self.constants.items()
        )

    def __str__(self) -> str:
        lines = [f"{v.name}: {v.spec} = input" for v in self.inputs]
        lines += [_line(self, node) for node in self.nodes]
        return "\n".join(map(one_line, [*lines, f"return {', '.join(self.outputs)}"]))


def identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """Equal for tensors that are the same memory seen in the same way, as tied weights are."""
    where = id(tensor) if tensor.is_meta else tensor.data_ptr()  # a meta tensor has no memory
    return where, tensor.dtype, tuple(tensor.shape), tensor.stride()


def op_name(op: Op) -> str:
    """The short name that tables and dumps show, such as `conv2d` or `aten.roll.default`."""
    return op.overload if isinstance(op, Aten) else type(op).__name__.lower()


def _line(graph: Graph, node: Node) -> str:
    defaults = {info.name: info.default for info in msgspec.structs.fields(node.op)}
    settings = [
        f"{key}={value}"
        for key, value in msgspec.structs.asdict(node.op).items()
        if key not in ("overload", "result", "epilogue") and value != defaults[key]
    ]
    if isinstance(node.op, Conv2d) and str(node.op.epilogue):
        settings.append(f"epilogue={node.op.epilogue}")
    settings += [f"{slot}={graph.spec(name)}" for slot, name in node.params.items()]
    text = f"{node.name}: {node.spec} = {op_name(node.op)}({', '.join([*node.inputs, *settings])})"
    return f"{text}  # {' + '.join(node.origin)}" if node.origin else text
