"""Graph → regions: which nodes one launch covers, beyond what the graph's own epilogues say.

So far: shortcut A. The subsampling Slice and the channel Pad of a parameter-free shortcut are not
run at all; the convolution that adds them reads the block's input strided, with a channel offset.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastres.graph.ir import Conv2d, Graph, Node, Pad, Slice


@dataclass(frozen=True)
class ShortcutA:
    """The residual of a convolution as a strided, channel-shifted view of `source`."""

    source: str
    stride: int
    channel_offset: int
    covers: tuple[str, ...]  # the Slice and Pad nodes that are not run


def shortcuts(graph: Graph) -> dict[str, ShortcutA]:
    """By the name of the convolution: the Slice and Pad that its residual operand needs not run."""
    users = graph.users()
    found = {}
    for node in graph.nodes:
        if isinstance(node.op, Conv2d) and node.op.epilogue.residual:
            view = _shortcut_a(graph, users, node.inputs[1])
            if view is not None:
                found[node.name] = view
    return found


def _shortcut_a(graph: Graph, users: dict[str, list[Node]], name: str) -> ShortcutA | None:
    stride, offset, covers = 1, 0, []
    while name in graph and graph.sole_user(users, name) is not None:
        node = graph[name]
        if isinstance(node.op, Pad) and _pads_channels_with_zeros(node.op) and stride == 1:
            offset += node.op.before[1]
        elif isinstance(node.op, Slice) and stride == 1 and _subsamples(node.op):
            stride = node.op.steps[2]
        else:
            break
        covers.append(name)
        name = node.inputs[0]
    return ShortcutA(name, stride, offset, tuple(covers)) if covers else None


def _pads_channels_with_zeros(op: Pad) -> bool:
    spatial = (0, 2, 3)
    return op.value == 0 and not any(op.before[i] or op.after[i] for i in spatial)


def _subsamples(op: Slice) -> bool:
    """x[:, :, ::s, ::s]"""
    whole = op.starts == (0, 0, 0, 0) and op.stops == (None, None, None, None)
    return whole and op.steps[:2] == (1, 1) and op.steps[2] == op.steps[3]
