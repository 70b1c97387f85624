"""A form: a kernel with a tile, for some nodes; and its reckoning, written down for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastres.backends.base import Choice
from fastres.backends.triton.problems import AnyTile
from fastres.errors import ArtifactError
from fastres.graph.ir import Node

Kind = Literal[
    "pointers",
    "folded stem",
    "stem and pool",
    "boxes",
    "chain",
    "chain without the next 1x1",
    "kernels of their own",
]
SEVERAL: Kind = "kernels of their own"  # each of which has a choice of its own


@dataclass(frozen=True)
class Form:
    """One way to run some nodes, and its estimated time.

    Args:
        tile: None where several kernels with tiles of their own are meant.
        merged: of a grouped convolution: groups that are one product.
    """

    kind: Kind
    tile: AnyTile | None
    seconds: float
    measured: bool = False
    problem: str = ""
    merged: int = 1

    def __str__(self) -> str:
        kind = self.kind if self.merged == 1 else f"{self.kind}, {self.merged} groups at once"
        return kind if self.tile is None else f"{kind} {self.tile}"

    @property
    def time(self) -> str:
        """In words."""
        return f"{1e6 * self.seconds:.1f} us {'measured' if self.measured else 'estimated'}"


def choice_of(nodes: tuple[Node, ...], taken: Form, others: dict[str, str]) -> Choice:
    """That some nodes run in one form and not in others."""
    names = tuple(node.name for node in nodes)
    time = 1e6 * taken.seconds
    return Choice(names, str(taken), time, taken.measured, taken.problem, others)


def strange(node: Node) -> ArtifactError:
    """That a stored plan was altered."""
    return ArtifactError(
        f"a stored plan has a form or a tile for {node.name} that it cannot have: copy the engine "
        "anew"
    )
