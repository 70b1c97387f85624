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
from typing import TYPE_CHECKING

from torch.export import ExportedProgram

from fastres.errors import CaptureError, FastresError
from fastres.graph.export import example_shapes
from fastres.graph.ir import Aten, Flatten, Graph, Node
from fastres.graph.shapes import with_sizes
from fastres.graph.specs import Dim, Sym
from fastres.graph.symbols import Place
from fastres.options import Input, Sizes

if TYPE_CHECKING:
    from fastres.graph.guards import Failure

Read = Callable[[ExportedProgram, Mapping[Place, int]], Graph]
_EXPORTS = 8  # of one model; each may find branches that those before have not met
_RESHAPES = frozenset(
    "flatten reshape squeeze unflatten unsqueeze view _reshape_copy _unsafe_view view_copy".split()
)
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
    read: Read,
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
            only, difference = _compared(graph, other, failure, read)
        except FastresError as error:
            raise CaptureError(f"{failure} not run, {_ADVICE}. There, {error}") from error
        if only is None:
            raise CaptureError(f"{failure} something else, {_ADVICE}. {difference}")
        others.append((other, only))


def _compared(
    graph: Graph, program: ExportedProgram, failure: Failure, read: Read
) -> tuple[Mapping[Place, int] | None, str]:
    """For which sizes alone a path is the graph, of those that it holds for; none if for all.

    None, and what is different, where it is another.
    """
    if _is_read_as(graph, program, read):
        return {}, ""
    # what is one size there may stand in the program as a number: that of the guard, or another
    for only in (failure.own, failure.at):
        try:
            here, there = with_sizes(graph, _letters(graph, only)), read(program, only)
        except CaptureError:
            if only is failure.at:
                raise
            continue
        if _are_same(here, there := with_sizes(there, {})):
            return only, ""
    return None, _difference(here, there)


def _is_read_as(graph: Graph, program: ExportedProgram, read: Read) -> bool:
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
    """Whether two graphs are equal, whatever their nodes are called and their reshapes are."""
    return _numbered(a).equals(_numbered(b))


def _numbered(graph: Graph) -> Graph:
    """The graph with its nodes numbered, and what is written in several ways written in one."""
    gone = _broadcast_anyway(graph)
    kept = [node for node in graph.nodes if node.name not in gone]
    names = {node.name: f"#{i}" for i, node in enumerate(kept)}
    names |= {name: names.get(read, read) for name, read in gone.items()}

    def written(node: Node) -> Node:
        op, reads = node.op, node.inputs
        if _reshapes(node):
            op, reads = Aten("aten.reshape.default", "", "", node.spec), node.inputs[:1]
        return node.with_(
            op=op,
            name=names[node.name],
            inputs=tuple(names.get(name, name) for name in reads),
            params={slot: names.get(name, name) for slot, name in node.params.items()},
            origin=(),
        )

    outputs = tuple(names.get(name, name) for name in graph.outputs)
    return graph.replace(nodes=tuple(map(written, kept)), outputs=outputs)


def _reshapes(node: Node) -> bool:
    """Whether it gives its first input's elements in their order, and its shape says all."""
    if not isinstance(node.op, Aten):
        return isinstance(node.op, Flatten)
    _, name, variant = node.op.overload.split(".")
    return name in _RESHAPES and variant != "dtype"


def _broadcast_anyway(graph: Graph) -> dict[str, str]:
    """Values that index_put writes, without dimensions of 1 in front, and what they were made of.

    The exporter takes those off where it sees them, which is where the batch is one.
    """
    users, found = graph.users(), {}
    for node in graph.nodes:
        if not _reshapes(node) or node.name in graph.outputs:
            continue
        (read, *_), shape = node.inputs, node.spec.shape
        before = graph.spec(read).shape
        front = before[: len(before) - len(shape)]
        writes = all(
            isinstance(user.op, Aten)
            and user.op.overload.startswith("aten.index_put.")
            and node.name not in user.inputs[:-1]
            for user in users.get(node.name, ())
        )
        if writes and set(front) == {1} and before[len(front) :] == shape:
            found[node.name] = read
    return found


def _difference(usual: Graph, other: Graph) -> str:
    """The first line in which two graphs differ."""
    lines = zip_longest(str(usual).splitlines(), str(other).splitlines(), fillvalue="nothing")
    here, there = next((pair for pair in lines if pair[0] != pair[1]), ("one result", "another"))
    return f"Where the example has `{here}`, it has `{there}`"
