"""Which calls of a program give the same memory: what an in-place call changes but its target."""

from __future__ import annotations

import torch.fx

Group = list[torch.fx.Node]


class NeedsFunctional(Exception):
    """A call changes tensors, or regions have modes, in a way that the reader does not follow.

    PyTorch's own functionalisation sorts that out; it costs seconds, so it is not done for every
    model.
    """


class Aliases:
    """The groups of a program's nodes that share memory, in the order in which they are read."""

    def __init__(self) -> None:
        self._groups: dict[torch.fx.Node, Group] = {}
        self._viewed: set[int] = set()  # ids of groups in which one node may be a view of another
        self._owned: set[torch.fx.Node] = set()  # the model's parameters and buffers

    def alone(self, node: torch.fx.Node, owned: bool = False) -> None:
        """The node has memory of its own, or that of the model's state (`owned`)."""
        self._groups[node] = [node]
        if owned:
            self._owned.add(node)

    def join(self, node: torch.fx.Node, other: torch.fx.Node, view: bool) -> None:
        """The node is another one, or (`view`) may be a part of it or seen in another way."""
        group = self._groups[other]
        group.append(node)
        self._groups[node] = group
        if view:
            self._viewed.add(id(group))

    def changed(self, node: torch.fx.Node, target: torch.fx.Node) -> Group:
        """The nodes that mean what an in-place call gives from now on, that call's included.

        Raises:
            NeedsFunctional: some of them are but parts of its target, or the other way round.
        """
        self.join(node, target, view=False)
        group = self._groups[target]
        if id(group) in self._viewed:
            raise NeedsFunctional(node.name)
        return group

    def is_owned(self, node: torch.fx.Node) -> bool:
        return node in self._owned
