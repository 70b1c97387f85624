"""What a fused graph looks like to a person: one box for each node that runs, in words."""

from __future__ import annotations

from dataclasses import dataclass

from fastres.backends.base import Choice
from fastres.backends.triton.planning.form import SEVERAL
from fastres.engine.info import MERGED, EngineInfo
from fastres.engine.profile import Profile, Row, group_of
from fastres.graph.cost import Shapes
from fastres.graph.ir import (
    Activation,
    Add,
    AvgPool,
    Conv2d,
    Dequantize,
    GlobalAvgPool,
    Graph,
    MaxPool,
    Node,
    Op,
    Quantize,
    op_name,
)

INPUT = "input"  # what stands in a box for an input of the graph
_MAIN = ".main"  # what an int8 convolution is called once its residual add stands by itself
_ACTIVATIONS = {"relu": "ReLU", "silu": "SiLU", "gelu": "GELU"}
_OPERATIONS = {"batchnorm": "BatchNorm", "add": "residual add", "normalize": "normalise pictures"}


@dataclass(frozen=True)
class Box:
    """One node as it is drawn.

    Args:
        group: the layer group that it belongs to.
        what: the operation: "conv 3×3 /2".
        shapes: "64×56×56 → 128×28×28", without the batch.
        fused: what else it does, in order: ("BatchNorm", "ReLU").
        ran_as: the kernel that ran, or the form that was chosen for it.
        rows: its times, and those of the quantising that belongs to it; none where what it does
            is part of another's launch.
        note: what else there is to know.
        inputs: the boxes that it reads.
        adds: whether its last input is added to what it computes.
    """

    name: str
    group: str
    what: str
    shapes: str
    fused: tuple[str, ...] = ()
    precision: str = ""
    ran_as: str = ""
    rows: tuple[Row, ...] = ()
    note: str = ""
    inputs: tuple[str, ...] = ()
    adds: bool = False

    @property
    def total(self) -> Row:
        """All of its rows; no time where it has none."""
        return Row(
            self.name,
            sum(row.milliseconds for row in self.rows),
            sum(row.share for row in self.rows),
            sum(row.flop for row in self.rows),
            sum(row.bytes for row in self.rows),
            least=sum(row.least for row in self.rows),
        )


def boxes_of(
    graph: Graph, source: Graph, info: EngineInfo, profile: Profile, shapes: Shapes
) -> list[Box]:
    """The inputs and every node, in the order in which they run.

    Quantising and dequantising belong to the node between them; only that of a graph's input has
    a box of its own.

    Args:
        graph: as it runs.
        source: as captured, before anything was fused.
        shapes: of every value in the run that was profiled.
    """
    owner = _owners(graph)
    rows = {row.name: row for row in profile.rows}
    nodes = {node.name: node for node in info.nodes}
    forms = _forms(info)
    quantised = {owner[node.name]: node for node in graph.nodes if isinstance(node.op, Quantize)}
    first = group_of(graph.nodes[0].name)
    boxes = [Box(v.name, first, INPUT, _size(shapes[v.name])) for v in graph.inputs]
    for node in graph.nodes:
        if owner[node.name] != node.name:
            continue
        own = [rows[name] for name, holder in owner.items() if holder == node.name and name in rows]
        told, form = nodes.get(node.name), forms.get(node.name)
        together = [name for name in (form.nodes if form else ()) if forms[name] is form]
        ran = max(own, key=lambda row: row.milliseconds).kernel if own else ""
        fused = _fused(node, graph, source)
        if node.name in quantised and quantised[node.name] is not node:
            fused += (f"quantise to {quantised[node.name].spec.dtype}",)
        merged = told is not None and told.precision == MERGED
        boxes.append(
            Box(
                node.name,
                group_of(node.name),
                _what(node, graph),
                f"{_size(shapes[node.inputs[0]])} → {_size(shapes[node.name])}",
                fused,
                told.precision if told is not None and not merged else "",
                " ".join(filter(None, (ran, form.taken if form is not None else ""))),
                tuple(own),
                _note(node.name, told.reason if told else None, together, own),
                tuple(dict.fromkeys(owner.get(name, name) for name in node.inputs)),
                isinstance(node.op, Add) or (isinstance(node.op, Conv2d) and len(node.inputs) > 1),
            )
        )
    return boxes


def captured_and_run(graph: Graph, source: Graph) -> dict[str, tuple[int, int]]:
    """Operation → how many were captured, and how many run by themselves."""
    counts: dict[str, tuple[int, int]] = {}
    for i, nodes in enumerate((source.nodes, graph.nodes)):
        for node in nodes:
            captured, run = counts.get(op_name(node.op), (0, 0))
            counts[op_name(node.op)] = (captured + (i == 0), run + (i == 1))
    return counts


def _owners(graph: Graph) -> dict[str, str]:
    """Node → the node whose box shows it."""
    owner: dict[str, str] = {}
    for node in graph.nodes:
        belongs = isinstance(node.op, Quantize | Dequantize) and node.inputs[0] in owner
        owner[node.name] = owner[node.inputs[0]] if belongs else node.name
    return owner


def _forms(info: EngineInfo) -> dict[str, Choice]:
    """Node → in which form it runs: of several choices about it, the last is about it alone."""
    made = [choice for choice in info.account.choices if choice.taken != SEVERAL]
    return {name: choice for choice in made for name in choice.nodes}


def _note(name: str, refused: str | None, together: list[str], own: list[Row]) -> str:
    if refused is not None:
        return f"runs in PyTorch: {refused}"
    others = [other for other in together if other != name]
    if others:
        return f"in one launch with {', '.join(others)}"
    return "" if own else "no time of its own: part of another"


def _fused(node: Node, graph: Graph, source: Graph) -> tuple[str, ...]:
    """What was captured behind the node's own operation and now is part of it."""
    origins = node.origins
    if node.name.endswith(_MAIN) and node.name.removesuffix(_MAIN) in graph:
        origins = graph[node.name.removesuffix(_MAIN)].origins
    ops = [source[name].op for name in origins if name in source]
    kinds = [type(op) for op in ops]
    behind = ops[kinds.index(type(node.op)) + 1 :] if type(node.op) in kinds else []
    if node.name.endswith(_MAIN):
        behind = [op for op in behind if not isinstance(op, Add | Activation)]
    own = [name for name in origins if name in source and type(source[name].op) is type(node.op)]
    bias = isinstance(node.op, Conv2d) and any("bias" in source[name].params for name in own)
    return (("bias",) if bias else ()) + tuple(map(_called, behind))


def _called(op: Op) -> str:
    if isinstance(op, Activation):
        return _ACTIVATIONS.get(op.kind, op.kind)
    return _OPERATIONS.get(op_name(op), op_name(op))


def _what(node: Node, graph: Graph) -> str:
    op = node.op
    if isinstance(op, Conv2d):
        kernel = graph.spec(node.params["weight"]).shape[2:]
        groups = f", {op.groups} groups" if op.groups > 1 else ""
        dilated = f", dilation {op.dilation[0]}" if op.dilation != (1, 1) else ""
        return f"conv {_size((0, *kernel))}{_stride(op.stride)}{groups}{dilated}"
    if isinstance(op, MaxPool | AvgPool):
        kind = "max" if isinstance(op, MaxPool) else "average"
        return f"{kind} pool {_size((0, *op.kernel))}{_stride(op.stride)}"
    if isinstance(op, GlobalAvgPool):
        return "global average pool"
    return _called(op)


def _stride(stride: tuple[int, int]) -> str:
    return f" /{stride[0]}" if stride != (1, 1) else ""


def _size(shape: tuple[object, ...]) -> str:
    """Of one image: the first dimension is left out."""
    return "×".join(map(str, shape[1:])) or "1"
