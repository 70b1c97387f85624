"""The one place that knows sizes: the shape of every value, for symbolic or concrete inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import singledispatch

import torch

from fastres.errors import GraphError
from fastres.graph import aten
from fastres.graph.ir import (
    Activation,
    Add,
    Aten,
    AvgPool,
    BatchNorm,
    Concat,
    Conv2d,
    Dequantize,
    Flatten,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Mul,
    Node,
    Normalize,
    Op,
    Pad,
    Quantize,
    Slice,
    Softmax,
    Value,
)
from fastres.graph.settings import check_settings
from fastres.graph.specs import Dim, Shape, Sym
from fastres.options import Sizes


def infer_shapes(graph: Graph, input_shapes: Sequence[Sequence[int]]) -> dict[str, Sizes]:
    """The concrete shape of every input and node for inputs of the given shapes.

    Raises:
        GraphError: the inputs do not fit the graph, or an operation cannot take its inputs.
    """
    shapes: dict[str, Shape] = dict(bind(graph, input_shapes))
    symbols = {
        dim: size
        for value in graph.inputs
        for dim, size in zip(value.spec.shape, shapes[value.name], strict=True)
        if isinstance(dim, Sym) and isinstance(size, int)
    }
    for node in graph.nodes:
        if isinstance(node.op, Aten) and (
            not aten.is_known(node.op) or any(0 in shapes.get(name, ()) for name in node.inputs)
        ):  # an empty batch: some of PyTorch's operators refuse it
            shapes[node.name] = tuple(
                d.at(symbols[Sym(d.symbol)]) if isinstance(d, Sym) else d
                for d in node.op.result.shape
            )
        else:
            shapes[node.name] = node_shape(graph, node, shapes)
    return shapes  # type: ignore[return-value]  # integers in, integers out


def with_sizes(graph: Graph, sizes: Mapping[str, Dim]) -> Graph:
    """The graph where these symbols have these values, or are others; its calls included."""
    inputs = tuple(Value(value.name, value.spec.at(sizes)) for value in graph.inputs)
    specs = {value.name: value.spec for value in inputs}
    nodes = []
    for node in graph.nodes:
        op, reads, specs[node.name] = node.op, node.inputs, node.spec.at(sizes)
        if isinstance(op, Aten):  # sizes that are numbers now are read off no input
            shapes = [specs[n].shape if n in specs else graph.spec(n).shape for n in reads]
            op, places = aten.with_known_sizes(op, shapes, op.result.at(sizes))
            reads = tuple(reads[i] for i in places)
        nodes.append(node.with_(op=op, inputs=reads, spec=specs[node.name]))
    return graph.replace(inputs=inputs, nodes=tuple(nodes))


def bind(graph: Graph, input_shapes: Sequence[Sequence[int]]) -> dict[str, Sizes]:
    """Checks concrete input shapes against the graph's and returns them by name."""
    if len(input_shapes) != len(graph.inputs):
        raise GraphError(f"{len(input_shapes)} inputs given, the graph has {len(graph.inputs)}")
    symbols: dict[Sym, int] = {}
    for value, given in zip(graph.inputs, input_shapes, strict=True):
        fits = len(given) == len(value.spec.shape)
        for dim, size in zip(value.spec.shape, given, strict=False):
            want = symbols.setdefault(dim, size) if isinstance(dim, Sym) else dim
            fits = fits and want == size
        if not fits:
            raise GraphError(f"input {value.name} has shape {list(given)}, expected {value.spec}")
    pairs = zip(graph.inputs, input_shapes, strict=True)
    return {value.name: tuple(int(size) for size in given) for value, given in pairs}


def node_shape(graph: Graph, node: Node, shapes: Mapping[str, Shape]) -> Shape:
    """The shape of one node's result, given the shapes of what it reads."""

    def shape_of(name: str) -> Shape:
        return shapes[name] if name in shapes else tuple(graph.constants[name].shape)

    inputs = [shape_of(name) for name in node.inputs]
    try:
        if isinstance(node.op, Aten):
            return _aten_shape(node.op, inputs, [graph.spec(n).torch_dtype for n in node.inputs])
        check_settings(node.op, [len(shape) for shape in inputs])
        params = {slot: _known(shape_of(name)) for slot, name in node.params.items()}
        return _rule(node.op, inputs, params)
    except (GraphError, IndexError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        got = ", ".join(f"[{', '.join(map(str, s))}]" for s in inputs)
        raise GraphError(f"{node.name}: {node.op} cannot take {got}: {error}") from error


def _known(shape: Shape) -> Sizes:
    """The shape of a parameter."""
    sizes = tuple(size for size in shape if isinstance(size, int))
    if len(sizes) != len(shape):
        raise GraphError("a parameter has a size that varies")
    return sizes


def conv_size(size: Dim, kernel: int, stride: int, padding: int, dilation: int) -> Dim:
    """floor((size + 2*padding - dilation*(kernel - 1) - 1) / stride) + 1."""
    reach = 2 * padding - dilation * (kernel - 1) - 1
    return _plus(_floordiv(_plus(size, reach), stride), 1)


def pool_size(
    size: Dim, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> Dim:
    """As conv_size, or rounded up where the last window still starts inside the padded input."""
    if not ceil_mode:
        return conv_size(size, kernel, stride, padding, dilation)
    reach = 2 * padding - dilation * (kernel - 1) - 1 + stride - 1
    out = _plus(_floordiv(_plus(size, reach), stride), 1)
    if isinstance(size, Sym) or isinstance(out, Sym):
        if padding or stride > kernel:
            raise GraphError("ceil_mode with padding needs fixed H and W: pass a fixed Input")
        return out
    return out - 1 if (out - 1) * stride >= size + padding else out


def _plus(size: Dim, n: int) -> Dim:
    return size.plus(n) if isinstance(size, Sym) else size + n


def _floordiv(size: Dim, n: int) -> Dim:
    if n < 1:
        raise GraphError(f"a stride of {n} leads nowhere")
    return size.floordiv(n) if isinstance(size, Sym) else size // n


def _positive(shape: Shape) -> Shape:
    for size in shape[2:]:
        if isinstance(size, int) and size < 1:
            raise GraphError("the result would be empty; the image is too small")
    return shape


def _check_bias(channels: int, params: Mapping[str, Sizes]) -> None:
    if params.get("bias", (channels,)) != (channels,):
        raise GraphError(f"bias {list(params['bias'])} needs one value per channel, {channels}")


@singledispatch
def _rule(op: Op, inputs: Sequence[Shape], params: Mapping[str, Sizes]) -> Shape:
    raise GraphError(f"no shape rule for {op}")


@_rule.register
def _(op: Conv2d, inputs: Sequence[Shape], params: Mapping[str, Sizes]) -> Shape:
    n, c, h, w = inputs[0]
    k, c_group, r, s = params["weight"]
    if c != c_group * op.groups:
        raise GraphError(f"weight {list(params['weight'])} needs {c_group * op.groups} channels")
    p = conv_size(h, r, op.stride[0], op.padding[0], op.dilation[0])
    q = conv_size(w, s, op.stride[1], op.padding[1], op.dilation[1])
    out = _positive((n, k, p, q))
    if k % op.groups:
        raise GraphError(f"{k} output channels do not go into {op.groups} groups")
    _check_bias(k, params)
    if op.epilogue.residual != (len(inputs) == 2) or (len(inputs) == 2 and inputs[1] != out):
        raise GraphError(f"the residual must have the output's shape {list(out)}")
    return out


@_rule.register(BatchNorm)
def _(op: BatchNorm, inputs: Sequence[Shape], params: Mapping[str, Sizes]) -> Shape:
    if any(shape != (inputs[0][1],) for shape in params.values()):
        raise GraphError(f"parameters {dict(params)} need one value per channel")
    return inputs[0]


@_rule.register(Activation)
@_rule.register(Softmax)
@_rule.register(Quantize)
@_rule.register(Dequantize)
def _(op: Op, inputs: Sequence[Shape], params: Mapping[str, Sizes]) -> Shape:
    return inputs[0]


@_rule.register
def _(op: Normalize, inputs: Sequence[Shape], params: Mapping[str, Sizes]) -> Shape:
    if len(inputs[0]) != 4 or inputs[0][1] != len(op.mean):
        raise GraphError(f"pictures of {len(op.mean)} channels, [N, 3, H, W], are normalised")
    return inputs[0]


@_rule.register(Add)
@_rule.register(Mul)
def _(op: Add | Mul, inputs: Sequence[Shape], params: Mapping[str, Sizes]) -> Shape:
    a, b = inputs
    rank = max(len(a), len(b))
    ones: Shape = (1,) * rank
    out: list[Dim] = []
    for x, y in zip((ones + a)[-rank:], (ones + b)[-rank:], strict=True):
        if x != y and 1 not in (x, y):
            raise GraphError(f"sizes {x} and {y} do not broadcast")
        out.append(y if x == 1 else x)
    return tuple(out)


@_rule.register(MaxPool)
@_rule.register(AvgPool)
def _(op: MaxPool | AvgPool, inputs: Sequence[Shape], params: Mapping[str, Sizes]) -> Shape:
    n, c, h, w = inputs[0]
    dilation = op.dilation if isinstance(op, MaxPool) else (1, 1)
    sizes = [
        pool_size(size, op.kernel[i], op.stride[i], op.padding[i], dilation[i], op.ceil_mode)
        for i, size in enumerate((h, w))
    ]
    return _positive((n, c, *sizes))


@_rule.register
def _(op: GlobalAvgPool, inputs: Sequence[Shape], params: Mapping[str, Sizes]) -> Shape:
    n, c, _, _ = inputs[0]
    return (n, c, 1, 1) if op.keepdim else (n, c)


@_rule.register
def _(op: Linear, inputs: Sequence[Shape], params: Mapping[str, Sizes]) -> Shape:
    k, c = params["weight"]
    if inputs[0][-1] != c:
        raise GraphError(f"weight {list(params['weight'])} needs {c} features")
    _check_bias(k, params)
    return (*inputs[0][:-1], k)


@_rule.register
def _(op: Flatten, inputs: Sequence[Shape], params: Mapping[str, Sizes]) -> Shape:
    head, tail = inputs[0][: op.start_dim], inputs[0][op.start_dim :]
    if any(isinstance(size, Sym) for size in tail):
        if all(size == 1 for size in tail[1:]):
            return (*head, tail[0])
        raise GraphError("flattening needs fixed sizes: pass a fixed Input")
    return (*head, math.prod(size for size in tail if isinstance(size, int)))


@_rule.register
def _(op: Concat, inputs: Sequence[Shape], params: Mapping[str, Sizes]) -> Shape:
    before, total, after = inputs[0][: op.dim], inputs[0][op.dim], inputs[0][op.dim + 1 :]
    for shape in inputs[1:]:
        if (shape[: op.dim], shape[op.dim + 1 :]) != (before, after):
            raise GraphError("inputs must agree in every other dimension")
        total = _joined(total, shape[op.dim])
    return (*before, total, *after)


def _joined(a: Dim, b: Dim) -> Dim:
    if isinstance(b, int):
        return _plus(a, b)
    if isinstance(a, int):
        return _plus(b, a)
    total = a.joined(b)
    if total is None:
        raise GraphError(f"{a} and {b} cannot be joined: pass a fixed Input")
    return total


@_rule.register
def _(op: Pad, inputs: Sequence[Shape], params: Mapping[str, Sizes]) -> Shape:
    sizes = zip(inputs[0], op.before, op.after, strict=True)
    return tuple(_plus(size, before + after) for size, before, after in sizes)


@_rule.register
def _(op: Slice, inputs: Sequence[Shape], params: Mapping[str, Sizes]) -> Shape:
    out: list[Dim] = []
    for size, start, stop, step in zip(inputs[0], op.starts, op.stops, op.steps, strict=True):
        if isinstance(size, Sym):
            if stop is not None or start < 0:
                raise GraphError("a slice that ends inside a variable size is not supported")
            out.append(_floordiv(_plus(size, step - 1 - start), step))
        else:
            out.append(len(range(size)[start:stop:step]))
    return tuple(out)


def _aten_shape(op: Aten, inputs: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> Shape:
    """PyTorch's own answer; the exporter's while sizes are open, or where it cannot be asked."""
    shapes = [[size for size in shape if isinstance(size, int)] for shape in inputs]
    if [len(shape) for shape in shapes] != [len(shape) for shape in inputs]:
        return op.result.shape
    if not inputs or not aten.is_known(op):  # without inputs it would be run, to learn its shape
        return op.result.shape
    pairs = zip(shapes, dtypes, strict=True)
    operands = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in pairs]
    try:
        return tuple(aten.call(op, operands).shape)
    except Exception as error:  # PyTorch raises many kinds where a call does not fit
        raise GraphError(str(error).strip().partition("\n")[0]) from error
