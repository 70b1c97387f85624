"""A 3x3 convolution of many channels → that of its outer taps, added to that of its middle ones.

OpenVINO adds the products of a convolution one after the other, 9 * C of them, and each addition
rounds: the error of a sum grows with its length, while PyTorch adds up parts. Two shorter sums
come near it. Both are convolutions again: the outer taps with twice the dilation, the middle ones
with less padding.

For OpenVINO in fp32 alone. The residual is added to the first, so that each has one term, which
OpenVINO fuses: two convolutions, and nothing beside them.
"""

from __future__ import annotations

import math

from msgspec.structs import replace

from fastres.graph.ir import Conv2d, Graph, Node
from fastres.kernels.epilogue import Epilogue
from fastres.kernels.geometry import Pair

SHORT_SUM = 9 * 64  # products
_TAPS = 3


def halve_sums(graph: Graph) -> Graph:
    """The same network, with sums of at most two thirds of the length; nodes keep their names."""
    nodes: list[Node] = []
    constants = dict(graph.constants)
    for node in graph.nodes:
        axis = _axis(graph, node)
        if axis is None:
            nodes.append(node)
            continue
        weight = node.params["weight"]
        for part, taps in (("outer", slice(None, None, 2)), ("middle", slice(1, 2))):
            index = (*[slice(None)] * axis, taps)
            constants[f"{weight}/{part}"] = graph.constants[weight][index].contiguous()
        nodes += _halves(node, axis - 2)
    return graph.replace(nodes=tuple(nodes), constants=constants)


def _axis(graph: Graph, node: Node) -> int | None:
    """Of the weight: where the taps lie by which a sum is halved, if it is."""
    op = node.op
    if not isinstance(op, Conv2d) or op.groups > 1 or "scale" in node.params:
        return None
    sizes = graph.constants[node.params["weight"]].shape
    if math.prod(sizes[1:]) <= SHORT_SUM:
        return None
    for axis in (3, 2):
        if sizes[axis] == _TAPS and op.padding[axis - 2] >= op.dilation[axis - 2]:
            return axis
    return None


def _halves(node: Node, side: int) -> tuple[Node, Node]:
    op, weight = node.op, node.params["weight"]
    assert isinstance(op, Conv2d)
    apart = op.dilation[side]
    outer = replace(
        op,
        dilation=_with(op.dilation, side, 2 * apart),
        epilogue=Epilogue(residual=op.epilogue.residual),
    )
    middle = replace(
        op,
        padding=_with(op.padding, side, op.padding[side] - apart),
        epilogue=Epilogue(residual=True, activation=op.epilogue.activation),
    )
    first = f"{node.name}/outer"
    return (
        Node(first, outer, node.inputs, node.spec, {"weight": f"{weight}/outer"}),
        node.with_(
            op=middle,
            inputs=(node.inputs[0], first),
            params={**node.params, "weight": f"{weight}/middle"},
        ),
    )


def _with(pair: Pair, side: int, value: int) -> Pair:
    return (value, pair[1]) if side == 0 else (pair[0], value)
