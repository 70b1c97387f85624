"""Saved engines that mislead: every digest fits, and what they say is changed at random.

For `engines.py`. Most of what is forged gets new shapes and dtypes afterwards, those that the
shape rules give: what only contradicts itself is refused early.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

import fastres
from fastres import models
from fastres.artifact.container import MANIFEST, SEAL, seal
from fastres.artifact.manifest import GRAPH, WEIGHTS
from fastres.graph import aten, serial, trees
from fastres.graph.ir import Aten, Graph, Node
from fastres.graph.shapes import node_shape
from fastres.graph.specs import DTYPE_NAMES, DTYPES, TensorSpec

Json = dict[str, Any]
Files = dict[str, bytes]
WHOLE = [0, -1, 1, 2, 3, 7, 16, 255, 1000, 65536, 10**6, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63)]
REAL = [0.0, 1.0, -1.0, 0.5, 1e-5, 1e-38, 5e-324, 1e30, 3.4e38, 1e308, -1e308]
TEXTS = [
    "",
    "x",
    "../x",
    "\x1b[31m",
    "a" * 4000,
    "float16",
    "int8",
    "relu",
    "reference",
    "N",
    "Sym",
]
LEAF = {"type": None, "context": None, "children_spec": []}


@dataclass(frozen=True)
class Source:
    """A sound engine: its files, and what it is called with."""

    name: str
    files: Files
    x: Tensor


class _Mixed(nn.Module):
    """What a ResNet has none of: joined branches, calls of PyTorch, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=2)
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = torch.cat([self.a(x), self.norm(self.b(self.a(x))).roll(1, 2)], 1)
        y = nn.functional.avg_pool2d(nn.functional.pad(y, (1, 1, 1, 1)), 3, 2)
        means = y.mean((2, 3))[:, ::2]
        return {"logits": self.head(means), "top": [means.topk(2, 1)[0]]}


def sources(folder: Path) -> list[Source]:
    torch.manual_seed(0)
    small, free = torch.randn(2, 3, 16, 16), ((1, 3, 12, 12), (2, 3, 16, 16), (8, 3, 32, 32))
    plain, mixed = models.cifar_resnet(8, seed=0).eval(), _Mixed().eval()
    bottleneck = models.ResNet(models.Bottleneck, (1, 1, 1, 1), planes=4, num_classes=6).eval()
    engines = {
        "plain": fastres.compile(plain, small, backend="cpu"),
        "mixed": fastres.compile(mixed, small, on_unsupported="fallback", max_batch_size=4),
        "ranged": fastres.compile(bottleneck, fastres.Input(free), backend="cpu"),
        "int8": fastres.compile(plain, small, precision="int8", calibration=[small], backend="cpu"),
    }
    found = []
    for name, engine in engines.items():
        with engine:
            engine.save(folder / name)
        files = {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        found.append(Source(name, files, small))
    return found


def forged(files: Files, chance: random.Random, calls: float) -> Files:
    """
    Args:
        calls: share of changes that bring in a call of PyTorch.
    """
    document, manifest = json.loads(files[GRAPH]), json.loads(files[MANIFEST])
    made = dict(files)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        graph = document[chance.choice(["graph", "graph", "source"])]
        if chance.random() < calls:
            _call(graph, manifest, chance)
            continue
        match chance.randrange(8):
            case 0 | 1 | 2:
                leaf(graph, chance)
            case 3:
                leaf({k: manifest[k] for k in ("options", "inputs", "preprocess")}, chance)
            case 4 | 5:
                _node(graph, chance)
            case 6:
                graph["output_tree"] = _tree(chance)
            case _:
                _bytes(made, chance)
    if chance.random() < 0.7:
        document = _fitting(document)
    made[GRAPH] = _text(document)
    entries = {n: d for n, d in made.items() if n not in (MANIFEST, SEAL)}
    manifest["files"] = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in entries.items()
    }
    made[MANIFEST] = json.dumps(manifest, indent=2).encode()
    made[SEAL] = seal(made[MANIFEST])
    return made


def _text(document: Json) -> bytes:
    """As a saver writes numbers, where it can."""
    try:
        return msgspec.json.encode(document)
    except (OverflowError, msgspec.MsgspecError):  # an integer beyond 64 bits
        return json.dumps(document, separators=(",", ":")).encode()


def leaf(document: Any, chance: random.Random) -> None:
    """Another value for a number, a text or an empty place."""
    places = list(leaves(document))
    if not places:
        return
    holder, key = chance.choice(places)
    old = holder[key]
    if chance.random() < 0.1:
        holder[key] = chance.choice([None, [], {}, True, "x", 1, [1]])
    elif isinstance(old, bool):
        holder[key] = not old
    elif isinstance(old, int):
        holder[key] = chance.choice([*WHOLE, old + 1, old - 1, 2 * old])
    elif isinstance(old, float):
        holder[key] = chance.choice([*REAL, -old, 2 * old])
    else:
        holder[key] = chance.choice(TEXTS)


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        if isinstance(part, dict | list) and part:
            yield from leaves(part)
        else:
            yield value, key


def _node(graph: Json, chance: random.Random) -> None:
    """A node removed, doubled, moved, read elsewhere, or given another's operation."""
    nodes = graph["nodes"]
    names = [n["name"] for n in nodes] + [v["name"] for v in graph["inputs"]]
    node = chance.choice(nodes)
    match chance.randrange(7):
        case 0:
            nodes.remove(node)
        case 1:
            nodes.insert(chance.randrange(len(nodes) + 1), {**node, "name": chance.choice(names)})
        case 2:
            chance.shuffle(nodes)
        case 3:
            node["inputs"] = [chance.choice(names) for _ in range(chance.randrange(4))]
        case 4:
            node["op"] = chance.choice(nodes)["op"]
        case 5:
            scale = {"scale": chance.choice(REAL)}
            node["op"] = {"type": chance.choice(["Quantize", "Dequantize"]), **scale}
        case _:
            graph["outputs"] = [chance.choice(names) for _ in range(chance.randrange(3))]
            children = [LEAF] * len(graph["outputs"])
            tree = {"type": "builtins.list", "context": "null", "children_spec": children}
            graph["output_tree"] = json.dumps([1, tree])


def _call(graph: Json, manifest: Json, chance: random.Random) -> None:
    """A call of PyTorch between a node and what it reads."""
    nodes = graph["nodes"]
    at = chance.randrange(len(nodes))
    before = [n["name"] for n in nodes[:at]] + [v["name"] for v in graph["inputs"]]
    reads = [*nodes[at]["inputs"][:1], *(chance.choice(before) for _ in range(chance.randrange(3)))]
    name, schema = chance.choice(_registry())
    args, named = [], {}
    for argument in schema.arguments:
        value = _argument(str(argument.real_type), len(reads), chance)
        if argument.kwarg_only:
            if chance.random() < 0.4:
                named[argument.name] = value
        elif not argument.has_default_value() or chance.random() < 0.5:
            args.append(value)
        else:
            break
    spec = json.loads(json.dumps(nodes[max(0, at - 1)]["spec"]))
    op = {"type": "Aten", "overload": name, "args": json.dumps(args), "kwargs": json.dumps(named)}
    op["result"] = spec
    new = {"name": "forged", "op": op, "inputs": reads, "spec": spec, "params": {}, "origin": []}
    nodes.insert(at, new)
    if nodes[at + 1]["inputs"] and chance.random() < 0.8:
        nodes[at + 1]["inputs"][0] = "forged"
    manifest["options"]["on_unsupported"] = "fallback"
    if chance.random() < 0.5:
        manifest["options"]["backend"] = "reference"


@cache
def _registry() -> list[tuple[str, Any]]:
    schemas = (s for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::"))
    named = ((f"aten.{s.name[6:]}.{s.overload_name or 'default'}", s) for s in schemas)
    return sorted(named, key=lambda pair: pair[0])


def _argument(kind: str, inputs: int, chance: random.Random) -> Any:
    if chance.random() < 0.03:
        return chance.choice([None, [], {"x": 1}, {"input": 9}, {"size": [0, 9, 0, 1]}, [[[[]]]]])
    if kind.startswith("Optional["):
        return None if chance.random() < 0.5 else _argument(kind[9:-1], inputs, chance)
    if kind.startswith("List["):
        inner = kind[5:-1]
        return [_argument(inner, inputs, chance) for _ in range(chance.choice([1, 2, 2, 3, 4]))]
    of_kind: dict[str, Callable[[], Any]] = {
        "Tensor": lambda: {"input": chance.randrange(max(1, inputs))},
        "bool": lambda: chance.random() < 0.5,
        "float": lambda: chance.choice([*REAL, {"float": "nan"}, {"float": "inf"}]),
        "number": lambda: chance.choice([*REAL, *WHOLE]),
        "str": lambda: chance.choice(["none", "mean", "reflect", "ij,jk->ik", "/etc/passwd"]),
        "ScalarType": lambda: chance.choice([{"dtype": "float32"}, {"dtype": "int64"}, 6, -1]),
        "MemoryFormat": lambda: chance.choice([{"memory_format": "preserve"}, 0, -1]),
        "Layout": lambda: chance.choice([{"layout": "strided"}, 1]),
        "Device": lambda: {"device": chance.choice(["cpu", "meta", "cuda"])},
    }
    usual = [0, 1, 1, 2, 3, 8, -1, {"size": [0, 0, 0, 1]}]
    return of_kind.get(kind, lambda: chance.choice(usual if chance.random() < 0.7 else WHOLE))()


def _tree(chance: random.Random) -> str:
    """What the model returns, as no model would."""
    names = ["os.system", "collections.deque", "builtins.dict", "torch.Size", "x.y", ""]
    node = {"type": chance.choice(names), "context": chance.choice(["null", "[]", '["a"]', 3])}
    node["children_spec"] = [LEAF] * chance.choice([0, 1, 2, 3000])
    deep = '{"type":"builtins.list","context":"null","children_spec":['
    depth = chance.choice([90, 2000, 50_000])
    nested = f"[1,{deep * depth}{json.dumps(LEAF)}{']}' * depth}]"
    return chance.choice([json.dumps([chance.choice([1, 2]), node]), nested, "", "[1]", "null"])


def _bytes(files: Files, chance: random.Random) -> None:
    """Other weights, or compiled parts that nobody compiled."""
    if chance.random() < 0.5:
        data = bytearray(files[WEIGHTS])
        at = chance.randrange(len(data))
        data[at : at + 4] = chance.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff" * 4])
        files[WEIGHTS] = bytes(data)
    else:
        name = chance.choice(["triton_plans.json", "triton_kernels.bin", "tensorrt.plan", "x.bin"])
        files[f"compiled_{name}"] = chance.choice([b"", b"{}", b"[" * 9999, chance.randbytes(99)])


def _fitting(document: Json) -> Json:
    """The document with the shapes and dtypes that the rules give, where they give any."""
    try:
        found = msgspec.json.decode(json.dumps(document), type=serial.Document)
        graphs = {w: _refitted(getattr(found, w)) for w in ("graph", "source")}
    except Exception:  # PyTorch and the decoder raise many kinds
        return document
    fitted: Json = json.loads(msgspec.json.encode(msgspec.structs.replace(found, **graphs)))
    return fitted


def _refitted(entry: serial.GraphEntry) -> serial.GraphEntry:
    constants = {
        name: torch.empty(c.shape, dtype=DTYPES[c.dtype], device="meta")
        for name, c in entry.constants.items()
    }
    shapes: dict[str, Any] = {value.name: value.spec.shape for value in entry.inputs}
    nodes: list[Node] = []
    for node in entry.nodes:
        graph = Graph(entry.inputs, tuple(nodes), (), constants, trees.LEAF)
        shape, dtype = node_shape(graph, node, shapes), node.spec.dtype
        op = node.op
        if isinstance(op, Aten):
            sizes = [
                [d if isinstance(d, int) else 2 for d in graph.spec(n).shape] for n in node.inputs
            ]
            dtypes = [graph.spec(n).torch_dtype for n in node.inputs]
            given = [
                torch.empty(s, dtype=d, device="meta") for s, d in zip(sizes, dtypes, strict=True)
            ]
            result = aten.call(op, given)
            dtype = DTYPE_NAMES[result.dtype]
            free = graph.spec(node.inputs[0]).shape[:1] if node.inputs else ()
            batch = result.shape[:1] == (2,) and bool(free)
            shape = (*free, *result.shape[1:]) if batch else tuple(result.shape)
            op = msgspec.structs.replace(op, result=TensorSpec(shape, dtype))
        shapes[node.name] = shape
        nodes.append(node.with_(op=op, spec=TensorSpec(shape, dtype)))
    return msgspec.structs.replace(entry, nodes=tuple(nodes))
