"""A quantised value that only strided 1x1 convolutions read → thinned out once, then read densely.

A 1x1 convolution of stride s reads every s-th pixel: those that MaxPool with a kernel of one and
that stride gives, which have the same scale. So where ResNet v1 begins a stage, the block's first
convolution and its projection read a quarter of the pixels, densely.

For OpenVINO alone: it moves such strides to whatever made the value, in front of the rounding, and
then runs these convolutions in float32. Where something else reads the value it does not, and a
pool would only cost.
"""

from __future__ import annotations

import msgspec

from fastres.graph.ir import Conv2d, Dequantize, Graph, MaxPool, Node
from fastres.graph.specs import TensorSpec

THINNED = ".thinned"


def thin_out(graph: Graph) -> Graph:
    """The same numbers; of a graph that `quantise` gave."""
    users = graph.users()
    thinned: dict[str, str] = {}  # value → what takes its place
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes.append(_dense(node, thinned[node.inputs[0]]) if _reads(node, thinned) else node)
        readers = users.get(node.name, [])
        if not isinstance(node.op, Dequantize) or node.name in graph.outputs:
            continue
        strides = {_stride(graph, reader, node.name) for reader in readers}
        if len(strides) == 1 and (stride := strides.pop()) is not None:
            name = node.name.removesuffix(".dequantized") + THINNED
            shape = (*node.spec.shape[:2], *readers[0].spec.shape[2:])
            whole, real = f"{name}.quantized", TensorSpec(shape, node.spec.dtype)
            before = graph[node.inputs[0]]
            eight = TensorSpec(shape, before.spec.dtype)
            nodes.append(Node(name, MaxPool((1, 1), stride), (node.name,), real))
            nodes.append(Node(whole, before.op, (name,), eight))
            nodes.append(Node(f"{name}.dequantized", node.op, (whole,), real))
            thinned[node.name] = f"{name}.dequantized"
    return graph.replace(nodes=tuple(nodes))


def _reads(node: Node, thinned: dict[str, str]) -> bool:
    return bool(node.inputs) and node.inputs[0] in thinned and isinstance(node.op, Conv2d)


def _dense(node: Node, source: str) -> Node:
    assert isinstance(node.op, Conv2d)
    op = msgspec.structs.replace(node.op, stride=(1, 1))
    return node.with_(op=op, inputs=(source, *node.inputs[1:]))


def _stride(graph: Graph, reader: Node, value: str) -> tuple[int, int] | None:
    """Of a quantised 1x1 convolution that reads this value, and only as its pixels."""
    op = reader.op
    if not isinstance(op, Conv2d) or "scale" not in reader.params or op.padding != (0, 0):
        return None
    if op.stride == (1, 1) or reader.inputs.count(value) != 1 or reader.inputs[0] != value:
        return None
    pointwise = tuple(graph.constants[reader.params["weight"]].shape[2:]) == (1, 1)
    return op.stride if pointwise else None
