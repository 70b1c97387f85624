"""Merging a node into the one reader of its value: the step that every fusion here consists of."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fastres.graph.ir import Graph, Node


class Merger:
    """Collects merges over one walk of a graph and builds the rewritten graph.

    A merged node keeps the producer's name, stands where the reader stood (there the operands of
    both are known), and lists in `origin` all captured operations it stands for.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._users = graph.users()
        self._gone: set[str] = set()  # producers, which move to their reader's place
        self._merged: dict[str, Node] = {}  # reader's name → the merged node that replaces it
        self._renamed: dict[str, str] = {}  # reader's name → merged node's name
        self.constants: dict[str, torch.Tensor] = dict(graph.constants)

    def sole_reader(self, name: str) -> Node | None:
        """The one node that reads a value, or None: several do, or the model returns it."""
        if name in self._gone:
            return None
        return self._graph.sole_user(self._users, name)

    def taken(self, name: str) -> bool:
        return name in self._merged or name in self._gone

    def merge(self, producer: Node, reader: Node, merged: Node) -> None:
        origin = producer.origins + reader.origins
        self._gone.add(producer.name)
        self._merged[reader.name] = merged.with_(
            name=producer.name, spec=reader.spec, origin=origin
        )
        self._renamed[reader.name] = producer.name

    def finish(self) -> Graph:
        nodes = [
            rename_inputs(self._merged.get(node.name, node), self._renamed)
            for node in self._graph.nodes
            if node.name not in self._gone
        ]
        outputs = tuple(self._renamed.get(name, name) for name in self._graph.outputs)
        return self._graph.replace(nodes=tuple(nodes), outputs=outputs, constants=self.constants)


def rename_inputs(node: Node, names: Mapping[str, str]) -> Node:
    if not any(name in names for name in node.inputs):
        return node
    return node.with_(inputs=tuple(names.get(name, name) for name in node.inputs))
