"""Graph → ONNX: the form in which the CPU backend, and users of other runtimes, take a graph.

Every ONNX node bears the name of the graph node it came from, with a suffix (`/add`, `/relu`)
where one graph node becomes several, so that a runtime's own report can be read back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import torch
from onnx import helper

from fastres.errors import UnsupportedError
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
    Graph,
    Linear,
    MaxPool,
    Mul,
    Node,
    Normalize,
    Pad,
    Quantize,
    Slice,
    Softmax,
    Value,
    op_name,
)
from fastres.graph.onnx_writer import (
    ACTIVATIONS,
    FLOAT,
    HALF,
    INT8,
    Writer,
    as_array,
    named,
    output_names,
)
from fastres.graph.specs import Dim, TensorSpec

OPSET = 20
IR_VERSION = 10
LIMIT = 2**31  # bytes of one protobuf message


def refusal(node: Node) -> str | None:
    """None if the node can be written as ONNX, else the reason why not."""
    if type(node.op) not in _WRITERS:
        return f"{op_name(node.op)} has no ONNX form here"
    if not node.spec.dtype.startswith(("float", "bfloat")) and not isinstance(node.op, Quantize):
        return f"its result is {node.spec.dtype}; only floating-point values are written"
    for setting in ("kernel", "stride", "padding", "dilation"):
        if max(getattr(node.op, setting, (0,))) >= 2**31:  # OpenVINO cuts bits off, and may crash
            return f"its {setting} is {getattr(node.op, setting)}; runtimes take 31 bits"
    if isinstance(node.op, MaxPool | AvgPool) and node.op.ceil_mode:
        gaps = any(s > k for s, k in zip(node.op.stride, node.op.kernel, strict=True))
        dilated = isinstance(node.op, MaxPool) and node.op.dilation != (1, 1)
        if gaps or dilated or any(node.op.padding):
            return (
                "with ceil_mode, runtimes differ from PyTorch in windows that start in the padding"
            )
    return None


def refusals(graph: Graph) -> tuple[tuple[str, str], ...]:
    """Every node that cannot be written, and why."""
    found = ((node.name, refusal(node)) for node in graph.nodes)
    return tuple((name, why) for name, why in found if why is not None)


def to_onnx(
    graph: Graph, *, half: bool = False, weights_as_inputs: bool = False
) -> onnx.ModelProto:
    """Writes a graph as an ONNX model with the same inputs, outputs and symbolic sizes, in float32.

    Its outputs have the names of `output_names`.

    Pictures that a Normalize reads are an input in uint8 [N, H, W, 3]. What is quantised becomes
    QuantizeLinear and DequantizeLinear, int8 with zero point 0; weights stay int8.

    Args:
        graph: lawful; every node one that `refusal` has nothing against.
        half: compute in float16 between the inputs and the outputs, which stay float32; in a
            quantised graph only the layers that are not, as scales would lose digits.
        weights_as_inputs: leave the constants' values out and declare them as further inputs of
            the same names, for a runtime that can take them without a copy.

    Raises:
        UnsupportedError: a constant that is to be float16 is beyond what that can hold.
    """
    writer = Writer(graph, half)
    for node in graph.nodes:
        _WRITERS[type(node.op)](writer, node)
    writer.end_outputs()
    for name in [name for name, kind in writer.read if kind == HALF]:
        _check_range(graph, name)
    proto = helper.make_graph(
        writer.nodes,
        "fastres",
        [_input_info(graph, value) for value in graph.inputs]
        + [_value_info(name, graph.spec(name)) for name, _ in writer.read if weights_as_inputs],
        [
            _value_info(written, graph.spec(name))
            for name, written in zip(graph.outputs, output_names(graph), strict=True)
        ],
        writer.initializers
        + [_weight(graph, *read) for read in writer.read if not weights_as_inputs],
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(
        proto, opset_imports=[opset], ir_version=IR_VERSION, producer_name="fastres"
    )


def to_bytes(graph: Graph, *, half: bool = False) -> bytes:
    """The written model with its weights, the same bytes for the same graph.

    Raises:
        UnsupportedError: as `to_onnx`, or the network is larger than an ONNX file can be.
    """
    proto = to_onnx(graph, half=half)
    weights = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    if weights >= LIMIT or proto.ByteSize() >= LIMIT:
        raise UnsupportedError(
            f"the network's weights take {weights} bytes; one ONNX model holds up to {LIMIT}"
        )
    return bytes(proto.SerializeToString(deterministic=True))


def inputs_for(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each input as the written model takes it: contiguous; pictures in uint8 [N, H, W, 3], all
    else in float32."""
    pictures = () if graph.normalize is None else graph.normalize.inputs
    return [
        x.permute(0, 2, 3, 1).contiguous() if value.name in pictures else _plain(x)
        for value, x in zip(graph.inputs, inputs, strict=True)
    ]


def _plain(x: torch.Tensor) -> torch.Tensor:
    if x.dtype == torch.float32 and x.is_contiguous() and not x.requires_grad:
        return x
    return x.detach().float().contiguous()


def origin_of(onnx_name: str) -> str:
    """The graph node that an ONNX node came from."""
    return onnx_name.split("/", 1)[0]


def _input_info(graph: Graph, value: Value) -> onnx.ValueInfoProto:
    if graph.normalize is None or value.name not in graph.normalize.inputs:
        return _value_info(value.name, value.spec)
    n, c, h, w = map(_dim, value.spec.shape)
    return helper.make_tensor_value_info(value.name, onnx.TensorProto.UINT8, [n, h, w, c])


def _value_info(name: str, spec: TensorSpec) -> onnx.ValueInfoProto:
    kind = INT8 if spec.dtype == "int8" else FLOAT
    return helper.make_tensor_value_info(name, kind, list(map(_dim, spec.shape)))


def _dim(size: Dim) -> int | str:
    return size if isinstance(size, int) else str(size)


def _check_range(graph: Graph, name: str) -> None:
    """Infinities that were there stay; what would become one is refused."""
    values = graph.constants[name].detach()
    values = values[values.isfinite()]
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest <= torch.finfo(torch.float16).max:
        return
    reader, slot = next(
        (node.name, slot)
        for node in graph.nodes
        for slot, read in (*node.params.items(), *(("operand", read) for read in node.inputs))
        if read == name
    )
    raise UnsupportedError(
        f"{reader}: its {slot}, with BatchNorm folded in, goes up to {largest:.4g} and exceeds "
        "fp16's 65504; use precision='fp32'"
    )


def _weight(graph: Graph, name: str, kind: int) -> onnx.TensorProto:
    array = as_array(graph.constants[name])
    if array.dtype == np.int8:
        kind = INT8
    elif kind == HALF:
        array = array.astype(np.float16)
    return helper.make_tensor(named(name, kind), kind, array.shape, array.tobytes(), raw=True)


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
    assert isinstance(node.op, Pad)
    pads = w.ints(node, "pads", (*node.op.before, *node.op.after))
    value = w.number(node, "value", np.asarray(node.op.value))
    w.emit("Pad", node.name, [*w.inputs(node), pads, value], node.name, mode="constant")


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
    whole, zero = (INT8, np.int8) if signed else (onnx.TensorProto.UINT8, np.uint8)
    point = w.initializer(f"{node.name}/zero", whole, np.asarray(0, zero))
    kind = "QuantizeLinear" if isinstance(node.op, Quantize) else "DequantizeLinear"
    w.emit(kind, node.name, [*w.inputs(node), scale, point], node.name)


def _softmax(w: Writer, node: Node) -> None:
    assert isinstance(node.op, Softmax)
    w.emit("Softmax", node.name, w.inputs(node), node.name, axis=node.op.dim)


_WRITERS: dict[type, Callable[[Writer, Node], None]] = {
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
