"""Which nodes of a graph the planner has no launch for."""

from __future__ import annotations

from fastres.backends.base import Refusal
from fastres.backends.triton.planning.regions import shortcuts
from fastres.graph.ir import (
    Activation,
    Add,
    AvgPool,
    BatchNorm,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Node,
    Normalize,
)


def refusals(graph: Graph) -> tuple[Refusal, ...]:
    """The nodes that the planner has no launch for, and why."""
    covered = {name for view in shortcuts(graph).values() for name in view.covers}
    reasons = ((node.name, _refusal(node, graph)) for node in graph.nodes)
    return tuple(Refusal(n, why) for n, why in reasons if why is not None and n not in covered)


def _refusal(node: Node, graph: Graph) -> str | None:
    op = node.op
    if isinstance(op, Conv2d | MaxPool | AvgPool | GlobalAvgPool | Normalize):
        return None
    if isinstance(op, Add | BatchNorm | Activation):
        return _elementwise_refusal(node, graph)
    if isinstance(op, Linear):
        return None if len(node.spec.shape) == 2 else "triton's linear takes [N, C] inputs only"
    if isinstance(op, Flatten):
        shape = graph.spec(node.inputs[0]).shape
        flat = op.start_dim == 1 and all(size == 1 for size in shape[2:])
        return None if flat else "triton flattens only [N, C, 1, 1]: others change the layout"
    return (
        f"triton has no kernel for {type(op).__name__}; it has Conv2d with residual and "
        "activation, BatchNorm, Add, Activation, MaxPool, AvgPool, GlobalAvgPool, Linear, and "
        "shortcut A inside a Conv2d"
    )


def _elementwise_refusal(node: Node, graph: Graph) -> str | None:
    shape = node.spec.shape
    if len(shape) not in (2, 4):
        return f"triton's elementwise kernel takes [N, C] and [N, C, H, W], not {node.spec}"
    if any(graph.spec(name).shape != shape for name in node.inputs):
        return "triton adds tensors of one shape only, without broadcasting"
    if any(name in graph.constants for name in node.inputs):
        return "triton adds no constants"
    return None
