"""What a network consists of: per layer its output shape, parameters and multiply-adds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastres.engine.engine import Engine
from fastres.errors import InputError
from fastres.graph.capture import capture
from fastres.graph.cost import multiply_adds
from fastres.graph.ir import Aten, Graph, Node, op_name
from fastres.graph.serial import same_tensors
from fastres.graph.shapes import infer_shapes
from fastres.options import Input, Sizes
from fastres.source import inputs_of
from fastres.text import empty_table, json_text, render

_STATISTICS = ("mean", "var")


@dataclass(frozen=True)
class Layer:
    """One node of the graph; `macs` are its multiply-adds."""

    name: str
    op: str
    output_shape: Sizes
    parameters: int
    macs: int


@dataclass(frozen=True)
class Summary:
    """A network's layers and totals; `str()` is a table.

    Args:
        parameters: of the whole network; a weight that several layers share counts once.
        uncounted: operations outside the IR, whose multiply-adds are not known and not in `macs`.
    """

    input_shapes: tuple[Sizes, ...]
    layers: tuple[Layer, ...]
    parameters: int
    macs: int
    uncounted: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json_text(self.to_dict())

    def __str__(self) -> str:
        table = empty_table()
        for heading in ("layer", "operation"):
            table.add_column(heading, no_wrap=True)
        for heading in ("output", "parameters", "multiply-adds"):
            table.add_column(heading, justify="right", no_wrap=True)
        for layer in self.layers:
            shape = "x".join(map(str, layer.output_shape))
            table.add_row(layer.name, layer.op, shape, f"{layer.parameters:,}", f"{layer.macs:,}")
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.input_shapes)
        lines = [
            render(table),
            f"input {shapes}: {self.parameters:,} parameters, {self.macs:,} multiply-adds "
            f"({2 * self.macs / 1e9:.3f} GFLOP)",
        ]
        if self.uncounted:
            lines.append(f"multiply-adds not known: {', '.join(self.uncounted)}")
        return "\n".join(lines)


def summary(
    model: torch.nn.Module | Graph | Engine, input_size: Sequence[int] | Input | None = None
) -> Summary:
    """Lists the layers of a network.

    Args:
        model: in eval(); or a Graph, which may be optimised; or an Engine, of which the network as
            captured is shown, before anything was fused.
        input_size: (N, C, H, W) or an Input, of which the usual size is taken. None takes
            (1, 3, 224, 224), or the size that the graph or engine has.

    Raises:
        CaptureError: the model cannot be captured.
        InputError, GraphError: the size does not fit the network.
    """
    given = input_size
    if given is not None and not isinstance(given, Input):
        given = Input(tuple(given) if isinstance(given, Sequence) else given)
    if isinstance(model, Graph):
        usual = [entry.usual for entry in inputs_of(model)]
        return _of_graph(model, [given.usual] if given else usual)
    if isinstance(model, torch.nn.Module):
        image = given or Input((1, 3, 224, 224))
        return _of_graph(capture(model, [image]).graph, [image.usual])
    if isinstance(model, Engine):
        usual = [entry.usual for entry in model.inputs]
        return _of_graph(model.source, [given.usual] if given else usual)
    raise InputError(f"model is {type(model).__name__}, not an nn.Module, a Graph or an Engine")


def _of_graph(graph: Graph, input_shapes: Sequence[Sizes]) -> Summary:
    shapes = infer_shapes(graph, input_shapes)
    layers = tuple(
        Layer(
            node.name,
            op_name(node.op),
            shapes[node.name],
            _parameters(graph, _learned(node)),
            multiply_adds(node, shapes, graph),
        )
        for node in graph.nodes
    )
    first = same_tensors(graph.constants)
    distinct = {first[name] for node in graph.nodes for name in _learned(node)}
    return Summary(
        tuple(tuple(shape) for shape in input_shapes),
        layers,
        _parameters(graph, distinct),
        sum(layer.macs for layer in layers),
        tuple(node.name for node in graph.nodes if isinstance(node.op, Aten)),
    )


def _learned(node: Node) -> list[str]:
    """The constants that training learns: not the running statistics of a BatchNorm."""
    return [name for slot, name in node.params.items() if slot not in _STATISTICS]


def _parameters(graph: Graph, names: Iterable[str]) -> int:
    return sum(graph.constants[name].numel() for name in names)
