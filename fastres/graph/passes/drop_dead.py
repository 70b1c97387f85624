"""Removes nodes that no output depends on, and constants that no node reads."""

from __future__ import annotations

from fastres.graph.ir import Graph


def drop_dead(graph: Graph) -> Graph:
    needed = set(graph.outputs)
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed.update(node.inputs)
            needed.update(node.params.values())
    return graph.replace(
        nodes=tuple(node for node in graph.nodes if node.name in needed),
        constants={name: t for name, t in graph.constants.items() if name in needed},
    )
