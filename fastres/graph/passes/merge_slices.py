"""Slice then Slice → one Slice: `x[:, :, ::2, ::2]` arrives as one call per dimension.

Refused where the inner result has another reader, or where both cut the same dimension.
"""

from __future__ import annotations

from fastres.graph.ir import Graph, Slice
from fastres.graph.passes.merging import Merger


def merge_slices(graph: Graph) -> Graph:
    merger = Merger(graph)
    for first in graph.nodes:
        second = merger.sole_reader(first.name)
        if second is None or merger.taken(first.name):
            continue
        if isinstance(first.op, Slice) and isinstance(second.op, Slice):
            op = _merged(first.op, second.op)
            if op is not None:
                merger.merge(first, second, first.with_(op=op))
    return merger.finish()


def _merged(a: Slice, b: Slice) -> Slice | None:
    rank = range(len(a.starts))
    cuts_a = [i for i in rank if (a.starts[i], a.stops[i], a.steps[i]) != (0, None, 1)]
    cuts_b = [i for i in rank if (b.starts[i], b.stops[i], b.steps[i]) != (0, None, 1)]
    if set(cuts_a) & set(cuts_b):
        return None

    def pick(of_a: tuple[int | None, ...], of_b: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return tuple(of_a[i] if i in cuts_a else of_b[i] for i in rank)

    return Slice(pick(a.starts, b.starts), pick(a.stops, b.stops), pick(a.steps, b.steps))  # type: ignore[arg-type]
