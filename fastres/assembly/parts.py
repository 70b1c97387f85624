"""What an engine is made of: the graph that runs with its executable, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from fastres.backends.base import Backend, Executable, Refusal
from fastres.calib.images import Preprocess
from fastres.graph.allowance import Allowance
from fastres.graph.ir import Graph
from fastres.options import Input, Options, Sizes


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
        prepared: shapes that a file's engine is made ready for, with whatever weights, and nothing
            of it is run for that. None: the usual ones of what was compiled here.
    """

    graph: Graph
    ignored_weights: tuple[str, ...] = ()
    prepared: tuple[Sizes, ...] | None = None


@dataclass(frozen=True)
class Parts:
    """All that an engine is made of.

    Args:
        options: with the precision and the device that were settled.
        passed_over: backends that were asked first, and why they do not run this.
        notes: what there is to say of where it came from.
        allowance: what a run of it may take; None for what was compiled here.
    """

    lowered: Lowered
    origin: Origin
    backend: Backend
    options: Options
    inputs: tuple[Input, ...]
    preprocess: Preprocess | None = None
    passed_over: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    allowance: Allowance | None = None
