"""Graph → regions: which nodes one launch may cover, beyond what the graph's own epilogues say.

Shortcut A: the subsampling Slice and the channel Pad of a parameter-free shortcut are not run at
all; the convolution that adds them reads the block's input strided, with a channel offset. Stems,
alone or with their max pool. Projections, beside the convolution that adds them. Boundaries of
bottlenecks, with the next block's first 1x1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastres.graph.ir import Conv2d, Flatten, Graph, Linear, MaxPool, Node, Pad, Slice, Value
from fastres.kernels.epilogue import Epilogue


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


def factors(graph: Graph) -> set[str]:
    """What convolutions and linear layers multiply, and the caller of the network does not get.

    A Flatten is another name of the value that it flattens, which is the one given.
    """
    names: dict[str, str] = {}
    read = set()
    for node in graph.nodes:
        source = names.get(node.inputs[0], node.inputs[0])
        if isinstance(node.op, Flatten):
            names[node.name] = source
        elif isinstance(node.op, Conv2d | Linear):
            read.add(source)
    return read - {names.get(name, name) for name in graph.outputs}


def entries(graph: Graph) -> list[Node | Value]:
    """What is brought in for each graph input: itself, or its Normalize, done on the way."""
    normalize = graph.normalize
    return [
        normalize if normalize is not None and value.name in normalize.inputs else value
        for value in graph.inputs
    ]


def stems(graph: Graph) -> dict[str, Node]:
    """By the name of an entry: the 7x7 convolution of stride 2 that alone reads it."""
    users = graph.users()
    found = {}
    for value in entries(graph):
        node = graph.sole_user(users, value.name)
        if node is None or not isinstance(node.op, Conv2d) or node.op.epilogue.residual:
            continue
        weight = graph.constants[node.params["weight"]]
        plain = node.op.groups == 1 and node.op.dilation == (1, 1)
        if plain and tuple(weight.shape[2:]) == (7, 7) and weight.shape[1] <= 4:
            found[value.name] = node
    return found


def pool_of(graph: Graph, stem: Node) -> Node | None:
    """ResNet's 3x3 max pool of stride 2, if it alone reads the stem."""
    node = graph.sole_user(graph.users(), stem.name)
    wanted = MaxPool(kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    return node if node is not None and node.op == wanted else None


@dataclass(frozen=True)
class Boundary:
    """A 3x3, the block's last 1x1 with its shortcut, and the next block's first 1x1, if it fits.

    Args:
        conv2: the 3x3, whose result only `conv3` reads.
        conv3: the 1x1 that adds the shortcut.
        projection: the 1x1 that makes the shortcut, read by `conv3` alone; None for a residual.
        following: the next block's first 1x1 of stride 1; None where there is none.
    """

    conv2: Node
    conv3: Node
    projection: Node | None
    following: Node | None

    @property
    def shorter(self) -> Boundary | None:
        """The same without the next block's first 1x1; None if it has none."""
        return None if self.following is None else replace(self, following=None)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All of them, in order of execution."""
        every = (self.conv2, self.projection, self.conv3, self.following)
        return tuple(node for node in every if node is not None)


def projections(graph: Graph) -> dict[str, Node]:
    """By the name of a convolution: the 1x1 convolution that its residual is, read by it alone.

    The two can be one product over concatenated depth. Only where the residual is rounded no
    sooner than the sum: a projection has no activation and no residual of its own.
    """
    users = graph.users()
    found = {}
    for node in graph.nodes:
        if not (isinstance(node.op, Conv2d) and node.op.epilogue.residual):
            continue
        name = node.inputs[1]
        if name in graph and graph.sole_user(users, name) is node:
            projection = graph[name]
            op = projection.op
            if (
                isinstance(op, Conv2d)
                and op.epilogue == Epilogue()
                and _is_pointwise(graph, projection)
            ):
                found[node.name] = projection
    return found


def boundaries(graph: Graph) -> list[Boundary]:
    """Every bottleneck boundary, in order of execution.

    A following 1x1 belongs to one boundary only, and so does everything else.
    """
    users = graph.users()
    projected = projections(graph)
    found = []
    for conv3 in graph.nodes:
        if not (isinstance(conv3.op, Conv2d) and conv3.op.epilogue.residual):
            continue
        conv2 = graph[conv3.inputs[0]] if conv3.inputs[0] in graph else None
        if conv2 is None or graph.sole_user(users, conv2.name) is not conv3:
            continue
        if not (
            _is_pointwise(graph, conv3) and conv3.op.stride == (1, 1) and _is_3x3(graph, conv2)
        ):
            continue
        if conv2.op.epilogue.activation != conv3.op.epilogue.activation:  # type: ignore[union-attr]
            continue
        following = [
            user
            for user in users.get(conv3.name, [])
            if isinstance(user.op, Conv2d)
            and user.inputs == (conv3.name,)
            and _is_pointwise(graph, user)
            and user.op.stride == (1, 1)
            and user.op.epilogue == Epilogue(activation=conv3.op.epilogue.activation)
        ]
        found.append(
            Boundary(
                conv2,
                conv3,
                projected.get(conv3.name),
                following[0] if len(following) == 1 else None,
            )
        )
    return found


def returned(graph: Graph) -> set[str]:
    """The values whose memory the network's caller gets to see, behind a Flatten or not."""
    found = {*graph.outputs}
    for node in reversed(graph.nodes):
        if isinstance(node.op, Flatten) and node.name in found:
            found.add(node.inputs[0])
    return found


def _is_pointwise(graph: Graph, node: Node) -> bool:
    if not isinstance(node.op, Conv2d):
        return False
    weight = graph.constants[node.params["weight"]]
    whole = node.op.groups == 1 and node.op.padding == (0, 0)
    return whole and tuple(weight.shape[2:]) == (1, 1)


def _is_3x3(graph: Graph, node: Node) -> bool:
    """A square 3x3 of padding 1 without a residual."""
    if not isinstance(node.op, Conv2d):
        return False
    op, weight = node.op, graph.constants[node.params["weight"]]
    return (
        tuple(weight.shape[2:]) == (3, 3)
        and op.padding == op.dilation == (1, 1)
        and op.stride[0] == op.stride[1]
        and op.groups == 1
        and not op.epilogue.residual
    )
