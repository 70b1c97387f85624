"""What TensorRT made of a network: its layers, and which of our nodes each of them computes.

Without a GPU no engine can be inspected; the table that the verbose builder log prints is read
instead. With one, the engine inspector gives the same as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastres.backends.tensorrt.plan import Layer
from fastres.graph.ir import Add, Conv2d, Graph, Linear
from fastres.graph.onnx import origin_of

_TYPES = {
    "Int8": "int8",
    "INT8": "int8",
    "Half": "fp16",
    "FP16": "fp16",
    "Float": "fp32",
    "FP32": "fp32",
    "BFloat16": "bf16",
    "UInt8": "uint8",
}
_TYPE = re.compile(rf"\b({'|'.join(_TYPES)})\b")
_LOGGED = re.compile(
    r"^\s*Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<reads>.*?), Constants: .*?"
    r"Outputs: (?P<writes>.*?), TacticName: .*?Metadata: ?(?P<nodes>.*)$",
    re.MULTILINE,
)
_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


def from_log(text: str) -> tuple[Layer, ...]:
    """The layers in a verbose builder log; those without a node of ours are left out."""
    found = (
        Layer(
            match["name"],
            match["kind"],
            _origins(match["nodes"]),
            _types(match["reads"]),
            _types(match["writes"]),
        )
        for match in _LOGGED.finditer(text)
    )
    return tuple(layer for layer in found if layer.nodes)


def from_inspector(text: str) -> tuple[Layer, ...]:
    """The layers in the engine inspector's JSON; without detailed verbosity there are none."""
    content = json.loads(text)
    found = []
    for entry in content.get("Layers", []):
        if isinstance(entry, Mapping):
            kind = str(entry.get("LayerType", ""))
            nodes = _origins(str(entry.get("Metadata", "")))
            reads, writes = (_types_of(entry.get(key, [])) for key in ("Inputs", "Outputs"))
            found.append(Layer(str(entry.get("Name", "")), kind, nodes, reads, writes))
    return tuple(layer for layer in found if layer.nodes)


def precisions(graph: Graph, layers: Sequence[Layer]) -> dict[str, str]:
    """What each node that some layer names reads there."""
    found: dict[str, str] = {}
    for layer in sorted(layers, key=lambda layer: not layer.multiplies):
        for name in layer.nodes:
            if layer.reads:
                found.setdefault(name, layer.reads[0])
    return {node.name: found[node.name] for node in graph.nodes if node.name in found}


def notes_on(graph: Graph, layers: Sequence[Layer]) -> tuple[str, ...]:
    """What did not come out as it should: int8 products in floats, epilogues by themselves."""
    ran = precisions(graph, layers)
    products = [node for node in graph.nodes if isinstance(node.op, Conv2d | Linear)]
    quantised = [node.name for node in products if "scale" in node.params]
    wider = [name for name in quantised if ran.get(name) != "int8"]
    notes = []
    if quantised:
        notes.append(f"{len(quantised) - len(wider)} of {len(quantised)} products read int8")
    if wider:
        notes.append(f"quantised, but not run in int8: {', '.join(wider)}")
    apart = [node.name for node in products if _is_apart(node.name, layers)]
    if apart:
        notes.append(
            f"{len(apart)} of {len(products)} products leave part of what follows them (addition, "
            f"ReLU, rounding) to a kernel of its own: {', '.join(apart[:4])}"
            f"{' ...' if len(apart) > 4 else ''}"
        )
    alone = [node.name for node in graph.nodes if isinstance(node.op, Add)]
    if alone:
        notes.append(f"additions that no convolution takes: {', '.join(alone)}")
    return tuple(notes)


def _is_apart(name: str, layers: Sequence[Layer]) -> bool:
    return sum(name in layer.nodes for layer in layers) > 1


def _origins(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(origin_of(name) for name in _ORIGIN.findall(text)))


def _types(text: str) -> tuple[str, ...]:
    return tuple(_TYPES[name] for name in _TYPE.findall(text))


def _types_of(entries: Any) -> tuple[str, ...]:
    """Of the inspector's tensors, whose type stands under one key or another."""
    texts = (
        " ".join(str(v) for k, v in entry.items() if "type" in k.lower() or "ormat" in k)
        for entry in entries
        if isinstance(entry, Mapping)
    )
    return tuple(types[0] for text in texts if (types := _types(text)))
