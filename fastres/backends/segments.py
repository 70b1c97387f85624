"""Running a graph that a backend takes only in part: refused nodes go to PyTorch, the rest to it.

The graph is cut into alternating segments, as few as the order of its nodes allows; values that
cross a cut pass through memory. Nothing here is silent: the refusals stand in `engine.info`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree

from fastres.backends.base import (
    Account,
    Backend,
    CompiledParts,
    Executable,
    NodeTime,
    Refusal,
    Run,
    until,
)
from fastres.backends.reference import ReferenceExecutable
from fastres.deadlines import Deadline
from fastres.errors import GraphError
from fastres.graph.ir import Dequantize, Graph, Node, Quantize, Value
from fastres.graph.shapes import infer_shapes
from fastres.options import DTYPE_OF, Options, Sizes


@dataclass(frozen=True)
class Segment:
    """A part of a graph, itself a graph; `fallback` says that PyTorch runs it."""

    graph: Graph
    fallback: bool


def split(graph: Graph, refused: Collection[str]) -> tuple[Segment, ...]:
    """Cuts a graph so that every segment holds only taken or only refused nodes.

    Nodes are taken greedily: from what is ready, all that can run on one side before changing
    sides, starting with the side of the first node. A Quantize with its Dequantize is no node of
    its own here: every segment that reads a value in int8 rounds it itself.
    """
    pairs = _pairs(graph)
    pending = [node for node in graph.nodes if not isinstance(node.op, Quantize | Dequantize)]
    produced = {value.name for value in graph.inputs} | set(graph.constants)
    parts: list[tuple[list[Node], bool]] = []
    fallback = bool(pending) and pending[0].name in refused
    while pending:
        taken: list[Node] = []
        rest: list[Node] = []
        for node in pending:
            ready = all(name in produced for name in _reads(node, pairs))
            if ready and (node.name in refused) == fallback:
                taken.append(node)
                produced.add(node.name)
            else:
                rest.append(node)
        if taken:
            parts.append((taken, fallback))
        elif not any(all(n in produced for n in _reads(node, pairs)) for node in rest):
            raise GraphError(f"{rest[0].name} reads what nothing before it produces")
        pending, fallback = rest, not fallback
    return tuple(
        Segment(
            _subgraph(graph, _with_pairs(nodes, pairs), _wanted(graph, pairs, parts[i + 1 :])),
            aside,
        )
        for i, (nodes, aside) in enumerate(parts)
    )


def _pairs(graph: Graph) -> dict[str, tuple[Node, Node]]:
    """By the name of a dequantised value: the Quantize and the Dequantize that make it."""
    ends = [node for node in graph.nodes if isinstance(node.op, Dequantize)]
    return {node.name: (graph[node.inputs[0]], node) for node in ends}


def _reads(node: Node, pairs: Mapping[str, tuple[Node, Node]]) -> list[str]:
    return [pairs[name][0].inputs[0] if name in pairs else name for name in node.inputs]


def _with_pairs(nodes: Sequence[Node], pairs: Mapping[str, tuple[Node, Node]]) -> list[Node]:
    """The nodes with the pairs that they read, each before its first reader."""
    found: dict[str, Node] = {}
    for node in nodes:
        for name in node.inputs:
            found.update((part.name, part) for part in pairs.get(name, ()))
        found[node.name] = node
    return list(found.values())


def _wanted(
    graph: Graph,
    pairs: Mapping[str, tuple[Node, Node]],
    later: Sequence[tuple[list[Node], bool]],
) -> set[str]:
    """What later segments read, and the caller."""
    read = {name for nodes, _ in later for node in nodes for name in _reads(node, pairs)}
    return read | set(graph.outputs)


def _subgraph(graph: Graph, nodes: Sequence[Node], wanted: Collection[str]) -> Graph:
    inside = {node.name for node in nodes}
    reads = dict.fromkeys(name for node in nodes for name in node.inputs)
    inputs = [name for name in reads if name not in inside and name not in graph.constants]
    outputs = [node.name for node in nodes if node.name in wanted]
    used = set(reads) | {name for node in nodes for name in node.params.values()}
    return Graph(
        inputs=tuple(Value(name, graph.spec(name)) for name in inputs),
        nodes=tuple(nodes),
        outputs=tuple(outputs),
        constants={name: t for name, t in graph.constants.items() if name in used},
        output_tree=pytree.tree_structure([0] * len(outputs)),
    )


def lower(
    backend: Backend,
    graph: Graph,
    options: Options,
    shapes: tuple[Sizes, ...],
    compiled: CompiledParts | None = None,
) -> tuple[Executable, tuple[Refusal, ...]]:
    """Lowers a graph, in segments if the backend refuses some nodes; returns those as well."""
    refused = backend.refusals(graph)
    if not refused:
        return backend.lower(graph, options, shapes, compiled), ()
    names = {refusal.node for refusal in refused}
    return _lower_in_segments(backend, graph, options, shapes, names), refused


def _lower_in_segments(
    backend: Backend,
    graph: Graph,
    options: Options,
    shapes: tuple[Sizes, ...],
    refused: Collection[str],
) -> SegmentedExecutable:
    """Lowers each segment to the backend, or to PyTorch in the engine's precision."""
    sizes = infer_shapes(graph, shapes)
    device = backend.device(options)
    steps: list[tuple[Graph, Executable]] = []
    for segment in split(graph, refused):
        part = segment.graph
        if segment.fallback:
            dtype = DTYPE_OF[options.precision or "fp32"]
            steps.append((part, ReferenceExecutable(part, dtype, device)))
        else:
            own = tuple(sizes[value.name] for value in part.inputs)
            steps.append((part, backend.lower(part, options, own)))
    return SegmentedExecutable(graph, steps)


class SegmentedExecutable:
    """Runs the segments in order."""

    def __init__(self, graph: Graph, steps: Sequence[tuple[Graph, Executable]]) -> None:
        self._graph = graph
        self._steps = steps

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self._run(inputs, [executable.run for _, executable in self._steps])

    def run_until(self, inputs: Sequence[torch.Tensor], deadline: Deadline) -> list[torch.Tensor]:
        """As `run`, where every part can be stopped."""
        return self._run(inputs, [until(executable, deadline) for _, executable in self._steps])

    def precisions(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for _, executable in self._steps:
            found.update(executable.precisions())
        return found

    def profile(self, inputs: Sequence[torch.Tensor]) -> list[NodeTime]:
        values, times = self._values(inputs), []
        for part, executable in self._steps:
            given = [values[value.name] for value in part.inputs]
            times += executable.profile(given)
            values.update(zip(part.outputs, executable.run(given), strict=True))
        return times

    def account(self) -> Account:
        return Account()

    def compiled(self) -> CompiledParts:
        return CompiledParts()

    def _run(self, inputs: Sequence[torch.Tensor], runs: Sequence[Run]) -> list[torch.Tensor]:
        values = self._values(inputs)
        for (part, _), run in zip(self._steps, runs, strict=True):
            results = run([values[value.name] for value in part.inputs])
            values.update(zip(part.outputs, results, strict=True))
        return [values[name] for name in self._graph.outputs]

    def _values(self, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {v.name: t for v, t in zip(self._graph.inputs, inputs, strict=True)}
