"""What an engine is made of: the graph that runs with its executable, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from fastres.backends.base import Executable, Refusal
from fastres.graph.ir import Graph


@dataclass(frozen=True)
class Lowered:
    """An optimised graph with the executable made from it; replaced as a whole by new weights."""

    graph: Graph
    executable: Executable
    refused: tuple[Refusal, ...] = ()

    @cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of each output."""
        return tuple(self.graph.spec(name).torch_dtype for name in self.graph.outputs)


@dataclass(frozen=True)
class Origin:
    """What is needed to make the graph anew from other weights.

    Args:
        graph: as captured. Constants that a state_dict holds are on the meta device: names, shapes
            and dtypes only.
        ignored_weights: state_dict entries that the graph does not read.
    """

    graph: Graph
    ignored_weights: tuple[str, ...] = ()
