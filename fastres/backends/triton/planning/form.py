"""A form: a kernel with a tile, for some nodes; ways of running them, compared and written down.

The model's estimates are optimistic, each kind of kernel's in its own way. So times are compared
with their like only: measured ones where all are measured, else estimates of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fastres.backends.base import Choice
from fastres.backends.triton.planning.problems import AnyTile
from fastres.errors import ArtifactError
from fastres.graph.ir import Node

Kind = Literal[
    "pointers",
    "folded stem",
    "stem and pool",
    "max pool",
    "vendor",
    "boxes",
    "chain",
    "chain without the next 1x1",
    "kernels of their own",
]
SEVERAL: Kind = "kernels of their own"  # each of which has a choice of its own


@dataclass(frozen=True)
class Form:
    """One way to run some nodes, and its time.

    Args:
        tile: None where several kernels with tiles of their own are meant.
        seconds: measured, else the estimate.
        estimate: by the model, of what is measured, too.
        problem: the key under which tables know it; empty for several kernels.
        merged: of a grouped convolution: groups that are one product.
    """

    kind: Kind
    tile: AnyTile | None
    seconds: float
    estimate: float
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


def several(forms: Iterable[Form]) -> Form:
    """Kernels one after the other; their sum is measured where each of them is."""
    forms = tuple(forms)
    estimate = sum(form.estimate for form in forms)
    measured = all(form.measured for form in forms)
    seconds = sum(form.seconds for form in forms) if measured else estimate
    return Form(SEVERAL, None, seconds, estimate, measured)


@dataclass(frozen=True)
class Way:
    """A form for some nodes, with the kernels of the nodes that it leaves to others.

    Args:
        left: what these are, in words.
    """

    form: Form
    rest: tuple[Form, ...] = ()
    left: str = ""

    def __str__(self) -> str:
        return f"{self.form} {self.left}".rstrip()

    @property
    def whole(self) -> Form:
        """All of it together, to be compared with other ways to run the same nodes."""
        return several((self.form, *self.rest))


def quickest(ways: Sequence[Way]) -> Way:
    """The way of least time: measured where all are, else by estimates; ties go to the earlier."""
    if all(way.whole.measured for way in ways):
        return min(ways, key=lambda way: way.whole.seconds)
    return min(ways, key=lambda way: way.whole.estimate)


def preferred(ways: Sequence[Way]) -> Way:
    """The first until all are measured, then the quickest.

    For kernels of different kinds, where the model does not see what sets them apart.
    """
    return quickest(ways) if all(way.whole.measured for way in ways) else ways[0]


def instead(ways: Sequence[Way], taken: Way) -> dict[str, str]:
    """In words, how long each way would take as a whole; the taken one where it leaves a rest."""
    return {str(way): way.whole.time for way in ways if way is not taken or way.rest}


def choice_of(nodes: tuple[Node, ...], taken: Form, others: dict[str, str]) -> Choice:
    """That some nodes run in one form and not in others."""
    names = tuple(node.name for node in nodes)
    times = 1e6 * taken.seconds, taken.measured, taken.problem
    return Choice(names, str(taken), *times, others, 1e6 * taken.estimate)


def strange(node: Node) -> ArtifactError:
    """That a stored plan was altered."""
    return ArtifactError(
        f"a stored plan has a form or a tile for {node.name} that it cannot have: copy the engine "
        "anew"
    )
