"""Looking inside a candidate: every layer at once, or the first wrong one by bisection.

Both lower parts of the candidate's graph anew through its own backend, because an engine shows its
outputs only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.utils._pytree as pytree

from fastres.backends import segments
from fastres.backends.base import Executable
from fastres.engine.engine import Engine
from fastres.errors import InputError
from fastres.graph import laws
from fastres.graph.ir import Dequantize, Graph, Node, Quantize, Value, op_name
from fastres.graph.passes.drop_dead import drop_dead
from fastres.graph.passes.split_residual import MAIN
from fastres.graph.passes.thin_out import THINNED
from fastres.graph.shapes import node_shape
from fastres.graph.specs import TensorSpec, spec_of
from fastres.parity.references import GraphReference, Reference, full_precision
from fastres.parity.report import Bisection, Comparison, Policy
from fastres.tolerances import Distance

Batch = tuple[torch.Tensor, ...]


class LayerCheck:
    """Compares every node of an engine's graph with the reference, over any number of batches.

    The graph is lowered once more with all its values as outputs. A runtime cannot fuse across a
    value that it must return, so this is another executable than the engine's own.
    """

    def __init__(self, engine: Engine, reference: Reference, policy: Policy) -> None:
        self._engine = engine
        self._reference = reference
        self._policy = policy
        nodes = [node for node in engine.graph.nodes if comparable(node)]
        self._quantised = GraphReference(engine.graph) if policy.quantised else None
        self._nodes = nodes
        self._graph = with_outputs(engine.graph, [node.name for node in nodes])
        self._executable: Executable | None = None
        # per node: the candidate's distance from the oracle, and the baseline's
        self._distances = {node.name: (policy.distance(), Distance()) for node in nodes}

    def add(self, inputs: Batch) -> None:
        """Takes in one batch.

        Raises:
            InputError: the reference has no value that a node stands for.
        """
        if self._executable is None:
            self._executable = lower(self._engine, self._graph, inputs)
        results = self._executable.run(on_device(self._engine, inputs))
        found = dict(zip(self._graph.outputs, results, strict=True))
        waiting = {node.origins[-1]: node.name for node in self._nodes}
        oracle = self._reference.walk(inputs, torch.float64)
        if self._quantised is None:
            pairs = zip(oracle, self._reference.walk(inputs, self._policy.dtype), strict=True)
            both = ((origin, want, base) for (origin, want), (_, base) in pairs)
        else:
            known = self._quantised.nodes(inputs, self._policy.dtype, waiting)
            both = ((origin, want, known.get(origin, want)) for origin, want in oracle)
        with full_precision():
            for origin, want, base in both:
                name = waiting.pop(origin, None)
                if name is not None:
                    candidate_distance, baseline_distance = self._distances[name]
                    candidate_distance.add(found.pop(name), want)
                    baseline_distance.add(base, want)
        if waiting:
            some = ", ".join(list(waiting)[:5])
            raise InputError(
                f"the reference has no value named {some}: its layers can be compared only with "
                "those of an engine compiled from the same model"
            )

    def rows(self) -> tuple[Comparison, ...]:
        return tuple(
            self._policy.judge(node.name, op_name(node.op), *self._distances[node.name])
            for node in self._nodes
        )


def find_first(
    engine: Engine, reference: Reference, policy: Policy, inputs: Batch, output: int
) -> Bisection | None:
    """The first node past its bound, by bisection over engines cut after one node.

    A cut engine returns that node alone, so the runtime's fusions up to there stay as they are.
    About log2(nodes) are lowered; then what the found node reads is tried too, because a wrong
    node in one branch leaves the other branch right.

    Args:
        inputs: one batch.
        output: index of an output that is past its bound.

    Returns:
        None if that output is within its bound on this batch.
    """
    cuts = _Cuts(engine, reference, policy, inputs)
    last = engine.graph.outputs[output]
    if last not in engine.graph or cuts.at(last).passed:
        return None
    name = _first_failing(cuts, engine.graph, last)
    return Bisection(cuts.at(name), cuts.isolated(name), cuts.lowerings)


def _first_failing(cuts: _Cuts, graph: Graph, last: str) -> str:
    """`last` fails; the failing node before it of which all that it reads passes."""
    suspects = [node.name for node in drop_dead(with_outputs(graph, [last])).nodes]
    good, bad = -1, len(suspects) - 1
    while bad - good > 1:
        middle = (good + bad) // 2
        if cuts.at(suspects[middle]).passed:
            good = middle
        else:
            bad = middle
    name = suspects[bad]
    for read in graph[name].inputs:
        if read in graph and not cuts.at(read).passed:
            return _first_failing(cuts, graph, read)
    return name


class _Cuts:
    """An engine cut after any node, compared with the reference on one batch."""

    def __init__(self, engine: Engine, reference: Reference, policy: Policy, inputs: Batch) -> None:
        self._engine = engine
        self._reference = reference
        self._policy = policy
        self._inputs = inputs
        self._known: dict[str, Comparison] = {}
        self.lowerings = 0

    def at(self, name: str) -> Comparison:
        """The value of a node in an engine that ends there."""
        if name not in self._known:
            self._known[name] = self._compare(name, self._engine.graph, self._inputs)
        return self._known[name]

    def isolated(self, name: str) -> Comparison:
        """The value of a node that is fed with the oracle's values of what it reads."""
        graph = self._engine.graph
        node = graph[name]
        given = dict(zip((value.name for value in graph.inputs), self._inputs, strict=True))
        origins = {read: graph[read].origins[-1] for read in node.inputs if read in graph}
        exact = self._reference.values(self._inputs, torch.float64, set(origins.values()))
        for read, origin in origins.items():
            given[read] = exact[origin].to(graph.spec(read).torch_dtype)
        reads = [read for read in dict.fromkeys(node.inputs) if read not in graph.constants]
        values = tuple(Value(read, spec_of(given[read])) for read in reads)
        shape = node_shape(graph, node, {value.name: value.spec.shape for value in values})
        shaped = node.with_(spec=TensorSpec(shape, node.spec.dtype))
        alone = graph.replace(inputs=values, nodes=(shaped,))
        return self._compare(name, alone, tuple(given[read] for read in reads))

    def _compare(self, name: str, graph: Graph, inputs: Batch) -> Comparison:
        """Lowers what of `graph` the node depends on, and runs it."""
        graph = drop_dead(with_outputs(graph, [name]))
        read = {name for node in graph.nodes for name in node.inputs}
        fed = [(v, x) for v, x in zip(graph.inputs, inputs, strict=True) if v.name in read]
        graph, inputs = graph.replace(inputs=tuple(v for v, _ in fed)), tuple(x for _, x in fed)
        self.lowerings += 1
        executable = lower(self._engine, laws.check(graph, "cutting"), inputs)
        found = executable.run(on_device(self._engine, inputs))[0]
        node = self._engine.graph[name]
        origin = node.origins[-1]
        want, base = (
            self._reference.values(self._inputs, dtype, {origin})[origin]
            for dtype in (torch.float64, self._policy.dtype)
        )
        candidate, baseline = self._policy.distance(), Distance()
        candidate.add(found, want)
        baseline.add(base, want)
        return self._policy.judge(name, op_name(node.op), candidate, baseline)


def comparable(node: Node) -> bool:
    """Whether the reference has a value for a node: none for what quantisation put between."""
    between = node.name.endswith((MAIN, THINNED))
    return not isinstance(node.op, Quantize | Dequantize) and not between


def with_outputs(graph: Graph, names: Sequence[str]) -> Graph:
    """The graph with other outputs, returned as a list."""
    tree = pytree.tree_structure([0] * len(names))
    return graph.replace(outputs=tuple(names), output_tree=tree)


def lower(engine: Engine, graph: Graph, inputs: Batch) -> Executable:
    """Lowers a part of an engine's graph as the engine itself was lowered."""
    shapes = tuple(tuple(x.shape) for x in inputs)
    return segments.lower(engine.backend, graph, engine.options, shapes)[0]


def on_device(engine: Engine, inputs: Batch) -> Batch:
    if engine.options.target is not None:  # of another machine; called, it says so
        return inputs
    return tuple(x.to(engine.device) for x in inputs)
