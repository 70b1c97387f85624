"""Conv2d whose epilogue adds a residual → the bare Conv2d, named with `.main`, and an Add.

The opposite of `fuse_residual`, for runtimes that want to see the addition, and for calibration,
which looks at what is added. The Add keeps the node's name and origin: it has its value.
"""

from __future__ import annotations

import msgspec

from fastres.graph.ir import Add, Conv2d, Graph, Node
from fastres.kernels.epilogue import Epilogue

MAIN = ".main"


def split_residual(graph: Graph) -> Graph:
    nodes: list[Node] = []
    for node in graph.nodes:
        if not isinstance(node.op, Conv2d) or not node.op.epilogue.residual:
            nodes.append(node)
            continue
        x, residual = node.inputs
        bare = msgspec.structs.replace(node.op, epilogue=Epilogue())
        main = Node(node.name + MAIN, bare, (x,), node.spec, node.params)
        add = Add(node.op.epilogue.activation)
        joined = node.with_(op=add, inputs=(main.name, residual), params={}, origin=node.origins)
        nodes += [main, joined]
    return graph.replace(nodes=tuple(nodes))
