"""One ONNX writer for each operation of the graph: `WRITERS`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from fastres.graph.ir import (
    Activation,
    Add,
    AvgPool,
    BatchNorm,
    Concat,
    Conv2d,
    Dequantize,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool,
    Mul,
    Node,
    Normalize,
    Pad,
    Quantize,
    Slice,
    Softmax,
)
from fastres.graph.onnx_writer import ACTIVATIONS, FLOAT, INT8, Writer


def _conv2d(w: Writer, node: Node) -> None:
    op = node.op
    assert isinstance(op, Conv2d)
    value = f"{node.name}/conv"
    w.emit(
        "Conv",
        node.name,
        [w.inputs(node)[0], w.weight(node), *w.params(node, "bias")],
        value,
        strides=op.stride,
        pads=(*op.padding, *op.padding),
        dilations=op.dilation,
        group=op.groups,
    )
    if op.epilogue.residual:
        w.emit("Add", f"{node.name}/add", [value, w.inputs(node)[1]], f"{node.name}/sum")
        value = f"{node.name}/sum"
    w.activate(node, op.epilogue.activation, value)


def _normalize(w: Writer, node: Node) -> None:
    assert isinstance(node.op, Normalize)
    name, (value,) = node.name, w.inputs(node)
    # TensorRT does nothing with bytes but cast them
    w.emit("Cast", f"{name}/cast", [value], f"{name}/pixels", to=FLOAT)
    value = f"{name}/pixels"
    if node.op.flip:
        order = w.ints(node, "order", (2, 1, 0))
        w.emit("Gather", f"{name}/flip", [value, order], f"{name}/flipped", axis=3)
        value = f"{name}/flipped"
    w.emit("Transpose", f"{name}/transpose", [value], f"{name}/planes", perm=(0, 3, 1, 2))
    a, b = (
        w.number(node, slot, np.asarray(v).reshape(1, 3, 1, 1))
        for slot, v in zip("ab", node.op.factors, strict=True)
    )
    w.emit("Mul", f"{name}/scale", [f"{name}/planes", a], f"{name}/scaled")
    w.emit("Add", name, [f"{name}/scaled", b], name)


def _batch_norm(w: Writer, node: Node) -> None:
    assert isinstance(node.op, BatchNorm)
    channels = w.graph.constants[node.params["mean"]].shape[0]
    scale, shift = w.filled(node, "weight", 1.0, channels), w.filled(node, "bias", 0.0, channels)
    inputs = [*w.inputs(node), scale, shift, *w.params(node, "mean", "var")]
    w.emit("BatchNormalization", node.name, inputs, f"{node.name}/norm", epsilon=node.op.eps)
    w.activate(node, node.op.activation, f"{node.name}/norm")


def _activation(w: Writer, node: Node) -> None:
    assert isinstance(node.op, Activation)
    kind = node.op.kind
    if kind == "silu":
        w.activate(node, kind, w.inputs(node)[0])
    else:
        w.emit(ACTIVATIONS[kind], node.name, w.inputs(node), node.name)


def _add(w: Writer, node: Node) -> None:
    assert isinstance(node.op, Add)
    w.emit("Add", node.name, w.inputs(node), f"{node.name}/sum")
    w.activate(node, node.op.activation, f"{node.name}/sum")


def _mul(w: Writer, node: Node) -> None:
    w.emit("Mul", node.name, w.inputs(node), node.name)


def _max_pool(w: Writer, node: Node) -> None:
    op = node.op
    assert isinstance(op, MaxPool)
    pads = (*op.padding, *op.padding)
    w.emit(
        "MaxPool",
        node.name,
        w.inputs(node),
        node.name,
        kernel_shape=op.kernel,
        strides=op.stride,
        pads=pads,
        dilations=op.dilation,
        ceil_mode=int(op.ceil_mode),
    )


def _avg_pool(w: Writer, node: Node) -> None:
    op = node.op
    assert isinstance(op, AvgPool)
    w.emit(
        "AveragePool",
        node.name,
        w.inputs(node),
        node.name,
        kernel_shape=op.kernel,
        strides=op.stride,
        pads=(*op.padding, *op.padding),
        ceil_mode=int(op.ceil_mode),
        count_include_pad=int(op.count_include_pad),
    )


def _global_avg_pool(w: Writer, node: Node) -> None:
    assert isinstance(node.op, GlobalAvgPool)
    out = node.name if node.op.keepdim else f"{node.name}/pooled"
    w.emit("GlobalAveragePool", node.name, w.inputs(node), out)
    if not node.op.keepdim:
        w.emit("Flatten", f"{node.name}/flatten", [out], node.name, axis=1)


def _linear(w: Writer, node: Node) -> None:
    assert isinstance(node.op, Linear)
    weight, bias = w.weight(node), w.params(node, "bias")
    value = f"{node.name}/linear"
    if len(node.spec.shape) == 2:
        w.emit("Gemm", node.name, [*w.inputs(node), weight, *bias], value, transB=1)
    else:
        w.emit("Transpose", f"{node.name}/transpose", [weight], f"{node.name}/wt", perm=(1, 0))
        w.emit("MatMul", node.name, [*w.inputs(node), f"{node.name}/wt"], value)
        if bias:
            w.emit("Add", f"{node.name}/bias", [value, *bias], f"{node.name}/sum")
            value = f"{node.name}/sum"
    w.activate(node, node.op.activation, value)


def _flatten(w: Writer, node: Node) -> None:
    assert isinstance(node.op, Flatten)
    if node.op.start_dim == 1:
        w.emit("Flatten", node.name, w.inputs(node), node.name, axis=1)
    else:  # 0 keeps a dimension, -1 takes the rest
        shape = w.ints(node, "shape", [0] * node.op.start_dim + [-1])
        w.emit("Reshape", node.name, [*w.inputs(node), shape], node.name)


def _concat(w: Writer, node: Node) -> None:
    assert isinstance(node.op, Concat)
    w.emit("Concat", node.name, w.inputs(node), node.name, axis=node.op.dim)


def _pad(w: Writer, node: Node) -> None:
    op = node.op
    assert isinstance(op, Pad)
    source = w.inputs(node)
    channels = op.before[1:2] + op.after[1:2]
    if w.pads_with_zeros and op.value != 0 and any(channels):
        source, op = [_with_channels(w, node, op, *channels)], _elsewhere(op)
    pads = w.ints(node, "pads", (*op.before, *op.after))
    value = w.number(node, "value", np.asarray(op.value))
    w.emit("Pad", node.name, [*source, pads, value], node.name, mode="constant")


def _with_channels(w: Writer, node: Node, op: Pad, before: int, after: int) -> str:
    """The operand with channels of zeros, to which the value is added: the same numbers.

    Of 8 bits, OpenVINO (2026.4) pads channels with the value itself, cut off to a whole number,
    where it stands for a number of steps.
    """
    rank, channels = len(op.before), node.spec.shape[1]
    assert isinstance(channels, int)
    sides = [0, before, *[0] * (rank - 1), after, *[0] * (rank - 2)]
    added = np.zeros((1, channels, *[1] * (rank - 2)))
    added[:, :before] = op.value
    added[:, channels - after :] = op.value
    zeros, sums = f"{node.name}/zeros", f"{node.name}/channels"
    operands = [w.ints(node, "channel_pads", sides), w.number(node, "zero", np.asarray(0.0))]
    w.emit("Pad", f"{zeros}/pad", [*w.inputs(node), *operands], zeros, mode="constant")
    w.emit("Add", f"{sums}/add", [zeros, w.number(node, "added", added)], sums)
    return sums


def _elsewhere(op: Pad) -> Pad:
    """The padding of all dimensions but the channels."""
    before, after = ((*side[:1], 0, *side[2:]) for side in (op.before, op.after))
    return Pad(before, after, op.value)


def _slice(w: Writer, node: Node) -> None:
    op = node.op
    assert isinstance(op, Slice)
    end = np.iinfo(np.int64).max
    stops = [end if stop is None else stop for stop in op.stops]
    operands = [
        w.ints(node, "starts", op.starts),
        w.ints(node, "stops", stops),
        w.ints(node, "axes", range(len(stops))),
        w.ints(node, "steps", op.steps),
    ]
    w.emit("Slice", node.name, [*w.inputs(node), *operands], node.name)


def _quantize(w: Writer, node: Node) -> None:
    assert isinstance(node.op, Quantize | Dequantize)
    scale = w.number(node, "scale", np.asarray(node.op.scale))
    quantised = node.spec if isinstance(node.op, Quantize) else w.graph.spec(node.inputs[0])
    signed = quantised.dtype == "int8"
    if signed and not w.centred:
        point = w.initializer(f"{node.name}/zero", INT8, np.asarray(0, np.int8))
    else:  # behind a Concat OpenVINO loses the scale of int8; uint8 around 128 is the same numbers
        zero = np.asarray(128 if signed else 0, np.uint8)
        point = w.initializer(f"{node.name}/zero", onnx.TensorProto.UINT8, zero)
    kind = "QuantizeLinear" if isinstance(node.op, Quantize) else "DequantizeLinear"
    w.emit(kind, node.name, [*w.inputs(node), scale, point], node.name)


def _softmax(w: Writer, node: Node) -> None:
    assert isinstance(node.op, Softmax)
    w.emit("Softmax", node.name, w.inputs(node), node.name, axis=node.op.dim)


WRITERS: dict[type, Callable[[Writer, Node], None]] = {
    Conv2d: _conv2d,
    Normalize: _normalize,
    BatchNorm: _batch_norm,
    Activation: _activation,
    Add: _add,
    Mul: _mul,
    MaxPool: _max_pool,
    AvgPool: _avg_pool,
    GlobalAvgPool: _global_avg_pool,
    Linear: _linear,
    Flatten: _flatten,
    Concat: _concat,
    Pad: _pad,
    Slice: _slice,
    Softmax: _softmax,
    Quantize: _quantize,
    Dequantize: _quantize,
}
