"""Conv2d then Add → Conv2d whose epilogue adds the other operand.

The convolution must have no activation of its own and no other reader, and the other operand must
be an activation of the same shape (not a broadcast, not a constant). Where both operands of the
Add qualify, as in a block with a projection shortcut, the first one (the main branch) takes it.

Refused where the convolution's result has another reader, where its epilogue is taken, or where
both operands are the same value.
"""

from __future__ import annotations

import msgspec

from fastres.graph.ir import Add, Conv2d, Graph, Node
from fastres.graph.passes.merging import Merger
from fastres.kernels.epilogue import Epilogue


def fuse_residual(graph: Graph) -> Graph:
    merger = Merger(graph)
    for add in graph.nodes:
        if not isinstance(add.op, Add) or add.op.activation is not None:
            continue
        for name, other in (add.inputs, add.inputs[::-1]):
            conv = graph[name] if name in graph else None
            if conv is None or merger.taken(name) or not _can_take(graph, merger, conv, add, other):
                continue
            assert isinstance(conv.op, Conv2d)
            op = msgspec.structs.replace(conv.op, epilogue=Epilogue(residual=True))
            merger.merge(conv, add, conv.with_(op=op, inputs=(conv.inputs[0], other)))
            break
    return merger.finish()


def _can_take(graph: Graph, merger: Merger, conv: Node, add: Node, other: str) -> bool:
    return (
        isinstance(conv.op, Conv2d)
        and conv.op.epilogue == Epilogue()
        and merger.sole_reader(conv.name) is add
        and other != conv.name
        and other not in graph.constants
        and graph.spec(other) == conv.spec
    )
