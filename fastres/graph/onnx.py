"""Graph → ONNX: the form in which the CPU backend, and users of other runtimes, take a graph.

Every ONNX node bears the name of the graph node it came from, with a suffix (`/add`, `/relu`)
where one graph node becomes several, so that a runtime's own report can be read back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import torch
from onnx import helper

from fastres.errors import UnsupportedError
from fastres.graph.ir import (
    AvgPool,
    Graph,
    MaxPool,
    Node,
    Quantize,
    Value,
    op_name,
)
from fastres.graph.onnx_nodes import WRITERS
from fastres.graph.onnx_writer import (
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
    if type(node.op) not in WRITERS:
        return f"{op_name(node.op)} has no ONNX form here"
    if not node.spec.dtype.startswith(("float", "bfloat")) and not isinstance(node.op, Quantize):
        return f"its result is {node.spec.dtype}; only floating-point values are written"
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
    graph: Graph,
    *,
    half: bool = False,
    for_openvino: bool = False,
    weights_as_inputs: bool = False,
) -> onnx.ModelProto:
    """Writes a graph as an ONNX model with the same inputs, outputs and symbolic sizes, in float32.

    Its outputs have the names of `output_names`.

    Pictures that a Normalize reads are an input in uint8 [N, H, W, 3]. What is quantised becomes
    QuantizeLinear and DequantizeLinear, int8 or uint8 with zero point 0; weights stay int8.

    Args:
        graph: lawful; every node one that `refusal` has nothing against.
        half: compute in float16 between the inputs and the outputs, which stay float32; in a
            quantised graph only the layers that are not, as scales would lose digits.
        for_openvino: where the graph has a Concat, write int8 values as uint8 with zero point 128.
        weights_as_inputs: leave the constants' values out and declare them as further inputs of
            the same names, for a runtime that can take them without a copy.

    Raises:
        UnsupportedError: a constant that is to be float16 is beyond what that can hold.
    """
    writer = Writer(graph, half, for_openvino)
    for node in graph.nodes:
        WRITERS[type(node.op)](writer, node)
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


def to_bytes(graph: Graph, *, half: bool = False, for_openvino: bool = False) -> bytes:
    """The written model with its weights, the same bytes for the same graph; see `to_onnx`.

    Raises:
        UnsupportedError: as `to_onnx`, or the network is larger than an ONNX file can be.
    """
    proto = to_onnx(graph, half=half, for_openvino=for_openvino)
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
