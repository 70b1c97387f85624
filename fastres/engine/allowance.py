"""What an engine from a file is looked at for, when inputs of new shapes come."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastres.errors import GraphError, InputError
from fastres.graph.allowance import Allowance
from fastres.graph.batching import check_split
from fastres.graph.ir import Graph
from fastres.options import Options, Sizes

_REMEMBERED = 1024  # shapes


class CallAllowance:
    """Looks once at each shape.

    Args:
        allowance: None for an engine that was compiled here, which may take anything.
    """

    def __init__(self, options: Options, allowance: Allowance | None = None) -> None:
        self._allowance = allowance
        self._limit = options.max_batch_size
        self._splits = options.oversize == "split"
        self._seen: set[tuple[tuple[Sizes, ...], bool]] = set()

    def check(self, graph: Graph, inputs: Sequence[torch.Tensor]) -> None:
        """
        Raises:
            InputError: a run would take more than the file may, or the batch cannot be run in
                parts, which is tried here: nothing of a file is run before it is called.
        """
        if self._allowance is None:
            return
        size = len(inputs[0])
        largest = min(size, self._limit or size)
        shapes = tuple((largest, *x.shape[1:]) for x in inputs)
        key = shapes, largest < size
        if size == 0 or key in self._seen:
            return
        try:
            self._allowance.check(graph, shapes, sum(x.nbytes for x in inputs))
        except GraphError as error:
            raise InputError(str(error)) from error
        if largest < size and self._splits:
            check_split(graph, shapes, largest)
        if len(self._seen) >= _REMEMBERED:
            self._seen.clear()
        self._seen.add(key)
