"""What the ONNX form is put together with: nodes, names, initializers, and types of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper

from fastres.graph.ir import Concat, Conv2d, Graph, Linear, Node, Normalize, Quantize
from fastres.kernels.epilogue import ActivationKind

FLOAT = int(onnx.TensorProto.FLOAT)
HALF = int(onnx.TensorProto.FLOAT16)
INT8 = int(onnx.TensorProto.INT8)
ACTIVATIONS = {"relu": "Relu", "sigmoid": "Sigmoid", "gelu": "Gelu", "hardswish": "HardSwish"}


class Writer:
    """Collects nodes, small initializers, and the names of the constants that are read."""

    def __init__(self, graph: Graph, half: bool, for_openvino: bool = False) -> None:
        self.graph = graph
        self.centred = for_openvino and any(isinstance(node.op, Concat) for node in graph.nodes)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.read: dict[tuple[str, int], None] = {}  # a set that keeps its order
        self._half = half
        self._quantised = any(isinstance(node.op, Quantize) for node in graph.nodes)
        self.pads_with_zeros = for_openvino and self._quantised
        self._cast: set[str] = set()

    def kind(self, node: Node) -> int:
        """The floating-point type that a node computes in."""
        narrow = self._half and not isinstance(node.op, Normalize)
        if self._quantised:
            narrow &= isinstance(node.op, Conv2d | Linear) and "scale" not in node.params
        return HALF if narrow else FLOAT

    def constant(self, name: str, kind: int) -> str:
        self.read[name, kind] = None
        return name if self.graph.constants[name].dtype == torch.int8 else named(name, kind)

    def inputs(self, node: Node) -> list[str]:
        """The values that a node reads, in the type that it computes in."""
        kind = self.kind(node)
        return [
            self.constant(name, kind) if name in self.graph.constants else self._as(name, kind)
            for name in node.inputs
        ]

    def _as(self, name: str, kind: int) -> str:
        if self.graph.spec(name).dtype in ("int8", "uint8") or self._kind_of(name) == kind:
            return name
        result = f"{name}/{'half' if kind == HALF else 'float'}"
        if result not in self._cast:
            self._cast.add(result)
            self.emit("Cast", f"{result}/cast", [name], result, to=kind)
        return result

    def _kind_of(self, name: str) -> int:
        return self.kind(self.graph[name]) if name in self.graph else FLOAT

    def end_outputs(self) -> None:
        """Ends what the graph returns in float32, under the names of `output_names`.

        Float16 results bear another name within, and are cast.
        """
        for name in dict.fromkeys(self.graph.outputs):
            if self._kind_of(name) != HALF:
                continue
            inner = f"{name}/inner"
            for node in self.nodes:
                for names in (node.input, node.output):
                    for i, found in enumerate(names):
                        names[i] = inner if found == name else found
            self.emit("Cast", f"{name}/widen", [inner], name, to=FLOAT)
        for name, written in zip(self.graph.outputs, output_names(self.graph), strict=True):
            if written != name:
                self.emit("Identity", f"{written}/copy", [name], written)

    def params(self, node: Node, *slots: str) -> list[str]:
        kind = self.kind(node)
        return [self.constant(node.params[slot], kind) for slot in slots if slot in node.params]

    def weight(self, node: Node) -> str:
        """The weight, dequantised where it is int8."""
        weight, *scale = self.params(node, "weight", "scale")
        if not scale:
            return weight
        zeros = np.zeros(self.graph.constants[weight].shape[0], np.int8)
        point = self.initializer(f"{node.name}/weight_zero", INT8, zeros)
        value = f"{node.name}/weight"
        inputs = [weight, *scale, point]
        self.emit("DequantizeLinear", f"{node.name}/dequantize", inputs, value, axis=0)
        return value

    def filled(self, node: Node, slot: str, value: float, length: int) -> str:
        """A parameter, or a vector of `value` where the layer has none."""
        kind = self.kind(node)
        if slot in node.params:
            return self.constant(node.params[slot], kind)
        return self.number(node, slot, np.full(length, value))

    def number(self, node: Node, slot: str, values: np.ndarray[Any, Any]) -> str:
        """An initializer of the type that a node computes in."""
        kind = self.kind(node)
        array = values.astype(np.float16 if kind == HALF else np.float32)
        return self.initializer(f"{node.name}/{slot}", kind, array)

    def ints(self, node: Node, slot: str, values: Sequence[int]) -> str:
        array = np.asarray(values, np.int64)
        return self.initializer(f"{node.name}/{slot}", onnx.TensorProto.INT64, array)

    def initializer(self, name: str, kind: int, array: np.ndarray[Any, Any]) -> str:
        tensor = helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True)
        self.initializers.append(tensor)
        return name

    def emit(self, kind: str, name: str, inputs: Sequence[str], output: str, **attrs: Any) -> None:
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=name, **attrs))

    def activate(self, node: Node, kind: ActivationKind | None, source: str) -> None:
        """Ends a graph node: applies its activation and gives the result the node's name."""
        if kind is None:
            self.nodes[-1].output[0] = node.name
        elif kind == "silu":
            self.emit("Sigmoid", f"{node.name}/sigmoid", [source], f"{node.name}/gate")
            self.emit("Mul", f"{node.name}/silu", [source, f"{node.name}/gate"], node.name)
        else:
            self.emit(ACTIVATIONS[kind], f"{node.name}/{kind}", [source], node.name)


def output_names(graph: Graph) -> tuple[str, ...]:
    """Of the written model's outputs, which must differ from one another and from the inputs.

    They are the graph's but where it returns an input, or the same value twice.
    """
    taken = {value.name for value in graph.inputs}
    names = []
    for i, name in enumerate(graph.outputs):
        names.append(f"{name}/output{i}" if name in taken else name)
        taken.add(name)
    return tuple(names)


def as_array(constant: torch.Tensor) -> np.ndarray[Any, Any]:
    """A constant as the ONNX form has it: int8 weights, and all else in float32."""
    tensor = constant.detach().contiguous()
    return (tensor if tensor.dtype == torch.int8 else tensor.float()).numpy()


def named(name: str, kind: int) -> str:
    """The name of a value, or of its copy in float16."""
    return f"{name}/half" if kind == HALF else name
