"""The two protocols that every backend meets: Backend (refuse or lower) and Executable (run)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fastres.graph.ir import Graph
from fastres.options import Options, Precision, Sizes


@dataclass(frozen=True)
class NodeTime:
    """Time of one graph node in one run, in milliseconds; `ran_as` is the kernel that ran."""

    name: str
    milliseconds: float
    ran_as: str = ""


@dataclass(frozen=True)
class Refusal:
    """A node that a backend does not take, and why."""

    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


class Executable(Protocol):
    """A lowered graph. Any number of threads may call it; what it holds goes when it does."""

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Runs on inputs that fit the graph and returns freshly allocated outputs in its order."""

    def precisions(self) -> dict[str, str]:
        """The precision each node actually runs in, as far as the backend can tell."""

    def profile(self, inputs: Sequence[torch.Tensor]) -> list[NodeTime]:
        """The time of each node in one run."""


class Backend(Protocol):
    """Turns graphs into executables, or says why not."""

    name: str

    def unavailable(self) -> str | None:
        """None, or why this backend cannot run on this machine and what would help."""

    def precision(self, wanted: Precision) -> str | None:
        """None if the precision is supported, else the reason why it is not."""

    def refusals(self, graph: Graph) -> tuple[Refusal, ...]:
        """Every node that cannot be lowered, with the reason; nothing is lowered."""

    def lower(self, graph: Graph, options: Options, shapes: tuple[Sizes, ...]) -> Executable:
        """Lowers a graph whose every node is supported, ready for inputs of these shapes."""

    def device(self, options: Options) -> torch.device:
        """Where the executable wants its inputs and puts its outputs."""
