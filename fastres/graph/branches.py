"""Whether a model does the same for every size that an engine promises.

The exporter notes where a model, or an operator of PyTorch, decided by a size. Where such a guard
fails for a promised size, the model is exported again at that size and the two graphs are compared.
Equal graphs settle it: the decision was one of memory formats, or of nothing that an engine does.
Different ones are a branch, which one graph cannot keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

from torch.export import ExportedProgram

from fastres.errors import CaptureError, FastresError
from fastres.graph.export import example_shapes
from fastres.graph.ir import Graph
from fastres.graph.shapes import with_sizes
from fastres.graph.specs import Dim, Sym
from fastres.graph.symbols import Place
from fastres.options import Input, Sizes

_EXPORTS = 8  # of one model; each may find branches that those before have not met
_LARGEST = 1 << 30  # values of an example
_ADVICE = (
    "but an engine would do the same for every size. Rewrite the line that decides by the size, or "
    "give an Input that fixes H and W"
)


def check_branches(
    program: ExportedProgram,
    graph: Graph,
    inputs: Sequence[Input],
    export: Callable[[Sequence[Sizes]], ExportedProgram],
    read: Callable[[ExportedProgram, Mapping[Place, int]], Graph],
) -> None:
    """Refuses a model that does something else for some size that an engine for `inputs` takes.

    Args:
        program, graph: the model as exported for the usual sizes, and as read from that.
        export: the model for other sizes.
        read: a program's graph, where some sizes may be taken for numbers.

    Raises:
        CaptureError: says for which sizes, and what is different there.
    """
    from fastres.graph.guards import first_failure  # 0.3 s: sympy

    others: list[tuple[ExportedProgram, Mapping[Place, int]]] = []
    usual = example_shapes(inputs)
    while (failure := first_failure(program, others, inputs)) is not None:
        shapes = failure.shapes(usual)
        if len(others) == _EXPORTS or max(map(math.prod, shapes)) > _LARGEST:
            raise CaptureError(f"{failure} something else or does not run, {_ADVICE}")
        try:
            other = export(shapes)
            if _is_read_as(graph, other, read):
                others.append((other, {}))
                continue
            # what is one size there may stand in the program as a number
            here = with_sizes(graph, _letters(graph, failure.at))
            there = with_sizes(read(other, failure.at), {})
        except FastresError as error:
            raise CaptureError(f"{failure} not run, {_ADVICE}. There, {error}") from error
        if not _are_same(here, there):
            raise CaptureError(f"{failure} something else, {_ADVICE}. {_difference(here, there)}")
        others.append((other, failure.at))


def _is_read_as(
    graph: Graph,
    program: ExportedProgram,
    read: Callable[[ExportedProgram, Mapping[Place, int]], Graph],
) -> bool:
    try:
        found = read(program, {})
    except CaptureError:  # its sizes do not go together but for the one that it was exported at
        return False
    # two sizes of the model may be one there, as H and W of square pictures
    ours, theirs = ([d for v in g.inputs for d in v.spec.shape] for g in (graph, found))
    pairs = zip(ours, theirs, strict=True)
    one = {a.symbol: b for a, b in pairs if isinstance(a, Sym) and isinstance(b, Sym)}
    return _are_same(with_sizes(graph, one), found)


def _letters(graph: Graph, at: Mapping[Place, int]) -> dict[str, Dim]:
    dims = ((graph.inputs[i].spec.shape[dim], size) for (i, dim), size in at.items())
    return {dim.symbol: size for dim, size in dims if isinstance(dim, Sym)}


def _are_same(a: Graph, b: Graph) -> bool:
    """Whether two graphs are equal, whatever their nodes are called."""
    return _numbered(a).equals(_numbered(b))


def _numbered(graph: Graph) -> Graph:
    names = {node.name: f"#{i}" for i, node in enumerate(graph.nodes)}
    nodes = tuple(
        node.with_(
            name=names[node.name],
            inputs=tuple(names.get(name, name) for name in node.inputs),
            params={slot: names.get(name, name) for slot, name in node.params.items()},
            origin=(),
        )
        for node in graph.nodes
    )
    outputs = tuple(names.get(name, name) for name in graph.outputs)
    return graph.replace(nodes=nodes, outputs=outputs)


def _difference(usual: Graph, other: Graph) -> str:
    """The first line in which two graphs differ."""
    lines = zip_longest(str(usual).splitlines(), str(other).splitlines(), fillvalue="nothing")
    here, there = next((pair for pair in lines if pair[0] != pair[1]), ("one result", "another"))
    return f"Where the example has `{here}`, it has `{there}`"
