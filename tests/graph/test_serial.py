"""fastres.graph.serial: graphs survive the way through JSON, and nothing but graphs gets in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from fastres.errors import GraphError
from fastres.graph import serial, trees
from fastres.graph.ir import (
    Add,
    Aten,
    Conv2d,
    Flatten,
    Graph,
    Linear,
    MaxPool,
    Node,
    Pad,
    Slice,
    Value,
)
from fastres.graph.specs import Sym, TensorSpec
from fastres.kernels.epilogue import Epilogue

SIZES = [(2, 3, 8, 8)]
N = Sym("N")


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.rand(shape, generator=generator).to(dtype)


def network(constants: dict[str, torch.Tensor] | None = None) -> Graph:
    """x[N, 3, 8, 8] → pad, pool, conv with residual, slice, flatten, two linear layers."""
    constants = constants or {
        "conv.weight": tensor(3, 3, 1, 1),
        "conv.bias": tensor(3),
        "fc.weight": tensor(48, 48),
    }
    shape = (N, 3, 8, 8)
    nodes = (
        Node("pad", Pad((0, 0, 1, 1), (0, 0, 1, 1), -math.inf), ("x",), TensorSpec((N, 3, 10, 10))),
        Node("pool", MaxPool((3, 3), (1, 1)), ("pad",), TensorSpec(shape)),
        Node(
            "conv",
            Conv2d(epilogue=Epilogue(residual=True, activation="relu")),
            ("pool", "x"),
            TensorSpec(shape),
            {"weight": "conv.weight", "bias": "conv.bias"},
            ("conv", "bn", "relu"),
        ),
        Node(
            "cut",
            Slice((0, 0, 0, 0), (None, None, None, None), (1, 1, 2, 2)),
            ("conv",),
            TensorSpec((N, 3, 4, 4)),
        ),
        Node("flatten", Flatten(), ("cut",), TensorSpec((N, 48))),
        Node("fc", Linear(), ("flatten",), TensorSpec((N, 48)), {"weight": "fc.weight"}),
        Node("fc2", Linear("relu"), ("fc",), TensorSpec((N, 48)), {"weight": "fc.weight"}),
        Node("roll", roll(), ("fc2",), TensorSpec((N, 48))),
        Node("add", Add(), ("roll", "fc"), TensorSpec((N, 48))),
    )
    return Graph((Value("x", TensorSpec(shape)),), nodes, ("add",), constants, trees.LEAF)


def roll(overload: str = "aten.roll.default", args: str = '[{"input":0},[1],[1]]') -> Aten:
    return Aten(overload, args, "{}", TensorSpec((N, 48)))


def on_meta(graph: Graph) -> Graph:
    return graph.replace(constants={k: t.to("meta") for k, t in graph.constants.items()})


def round_trip(graph: Graph) -> Graph:
    return serial.decode(*serial.encode(graph, on_meta(graph)), SIZES)[0]


class TestRoundTrip:
    def test_everything_survives(self) -> None:
        graph = network()
        text, tensors = serial.encode(graph, on_meta(graph))
        again, source, notes = serial.decode(text, tensors, SIZES)
        assert again.equals(graph)
        assert source.structure() == graph.structure()
        assert all(t.is_meta for t in source.constants.values())
        assert serial.encode(again, source)[0] == text

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
    def test_every_dtype(self, dtype: torch.dtype) -> None:
        graph = network().replace(
            constants={**network().constants, "unused": tensor(3, dtype=dtype)}
        )
        assert round_trip(graph).equals(graph)

    def test_a_tied_weight_is_one_tensor_again(self) -> None:
        shared = tensor(48, 48)
        graph = network({**network().constants, "fc.weight": shared, "tied": shared.detach()})
        text, tensors = serial.encode(graph, on_meta(graph))
        assert set(tensors) == {"conv.weight", "conv.bias", "fc.weight"}
        again, *_ = serial.decode(text, tensors, SIZES)
        assert again.equals(graph)
        assert again.constants["tied"] is again.constants["fc.weight"]

    def test_views_of_one_storage_are_stored_apart(self) -> None:
        block = tensor(96, 48)
        views = {"fc.weight": block[:48], "lower": block[48:], "turned": block[:48].t()}
        graph = network({**network().constants, **views})
        _, tensors = serial.encode(graph, on_meta(graph))
        assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == len(tensors)
        assert all(t.is_contiguous() for t in tensors.values())
        assert round_trip(graph).equals(graph)

    def test_whole_numbers_take_the_declared_type(self) -> None:
        graph = network()
        pad = graph["pad"].with_(op=Pad((0, 0, 1, 1), (0, 0, 1, 1), 1))
        assert round_trip(graph.replace(nodes=(pad, *graph.nodes[1:])))["pad"].op.value == 1.0

    def test_nan_cannot_be_written(self) -> None:
        graph = network()
        pad = graph["pad"].with_(op=Pad((0, 0, 1, 1), (0, 0, 1, 1), math.nan))
        with pytest.raises(GraphError, match="cannot be written as JSON"):
            serial.encode(graph.replace(nodes=(pad, *graph.nodes[1:])), on_meta(graph))


Json = dict[str, Any]


def put(path: str, value: object) -> Callable[[Json], None]:
    """Sets what lies at a path such as `graph.nodes.0.op.groups`; a node may go by its name."""

    def mutate(document: Json) -> None:
        place: Any = document
        *steps, last = path.split("/")
        for step in steps:
            if isinstance(place, list):
                by_name = {n["name"]: n for n in place if isinstance(n, dict)}
                place = place[int(step)] if step.isdigit() else by_name[step]
            else:
                place = place[step]
        place[int(last) if isinstance(place, list) else last] = value

    return mutate


def drop(path: str, key: str) -> Callable[[Json], None]:
    def mutate(document: Json) -> None:
        place: Any = document
        for step in path.split("/"):
            place = place[step]
        del place[key]

    return mutate


MUTATIONS: dict[str, tuple[Callable[[Json], None], str]] = {
    "unknown operation": (put("graph/nodes/conv/op/type", "Conv7d"), "Conv7d"),
    "unknown field": (put("graph/nodes/conv/op/quantised", True), "not exactly those"),
    "unknown field of a graph": (put("graph/more", 1), "unknown field `more`"),
    "name is a number": (put("graph/nodes/conv/name", 1), "Expected `str`, got `int`"),
    "stride is a text": (put("graph/nodes/conv/op/stride", ["1", "1"]), "Expected `int`"),
    "stride has three": (put("graph/nodes/conv/op/stride", [1, 1, 1]), "length 2"),
    "groups is a bool": (put("graph/nodes/conv/op/groups", True), "Expected `int`"),
    "activation unknown": (put("graph/nodes/fc2/op/activation", "exec"), "Invalid enum value"),
    "no nodes": (drop("graph", "nodes"), "missing required field `nodes`"),
    "no source": (put("source", None), "Expected `object`, got `null`"),
    "stride 0": (
        put("graph/nodes/conv/op/stride", [0, 1]),
        "its stride is 0, 1; it must be from 1",
    ),
    "kernel below 0": (
        put("graph/nodes/pool/op/kernel", [-3, 3]),
        "its kernel is -3, 3; it must be from 1",
    ),
    "groups 0": (put("graph/nodes/conv/op/groups", 0), "its groups is 0; it must be from 1"),
    "padding below 0": (
        put("graph/nodes/conv/op/padding", [-1, 0]),
        "its padding is -1, 0; it must be from 0",
    ),
    "step 0": (
        put("graph/nodes/cut/op/steps", [1, 1, 0, 1]),
        "its steps is 1, 1, 0, 1; it must be from 1",
    ),
    "size below 0": (put("graph/inputs/x/spec/shape", [2, -3, 8, 8]), "impossible size -3"),
    "division by 0": (
        put("graph/inputs/x/spec/shape/0", {"type": "Sym", "symbol": "N", "add": 0, "div": 0}),
        "impossible size",
    ),
    "none of each image": (
        put(
            "graph/inputs/x/spec/shape/0",
            {"type": "Sym", "symbol": "N", "add": 0, "div": 1, "mul": 0},
        ),
        "impossible size",
    ),
    "huge size": (put("graph/inputs/x/spec/shape", [2, 3, 2**62, 8]), "impossible size"),
    "huge product": (put("graph/inputs/x/spec/shape", [2, 3, 2**30, 2**30]), "any memory"),
    "huge constant": (put("source/constants/fc.weight/shape", [2**40, 2**40]), "any memory"),
    "dtype unknown": (put("graph/nodes/conv/spec/dtype", "float4"), "dtype 'float4'"),
    "constant dtype unknown": (put("graph/constants/conv.bias/dtype", "f"), "dtype 'f'"),
    "constant shape": (put("graph/constants/conv.bias/shape", [4]), "the weights hold"),
    "constant dtype": (put("graph/constants/conv.bias/dtype", "float16"), "the weights hold"),
    "tensor missing": (put("graph/constants/conv.bias/stored", "away"), "do not hold the same"),
    "tensor left over": (drop("graph/constants", "conv.bias"), "do not hold the same"),
    "claims another shape": (put("graph/nodes/fc/spec/shape", [2, 48]), "the shape rules say"),
    "reads nothing": (put("graph/nodes/fc/inputs", ["nobody"]), "nothing before it produces"),
    "reads itself": (put("graph/nodes/fc/inputs", ["fc"]), "nothing before it produces"),
    "name used twice": (put("graph/nodes/fc2/name", "fc"), "used twice"),
    "no inputs": (put("graph/nodes/fc/inputs", []), "cannot take"),
    "slot unknown": (put("graph/nodes/fc/params", {"gain": "fc.weight"}), "parameters"),
    "output missing": (put("graph/outputs", ["nobody"]), "produced by nothing"),
    "tree of two": (put("graph/outputs", ["fc", "add"]), "1 leaves"),
    "tree is no JSON": (put("graph/output_tree", "("), "output tree cannot be read"),
    "tree of the source": (
        put("source/output_tree", "[]"),
        "the graph and its source return different things",
    ),
    "infinity elsewhere": (put("graph/infinite_pads", {"fc": "inf"}), "is no Pad"),
    "infinity of a kind": (put("graph/infinite_pads", {"pad": "nan"}), "Invalid enum value"),
    "operator unknown": (put("graph/nodes/roll/op/overload", "aten.nothing.x"), "no pure operator"),
    "operator elsewhere": (put("graph/nodes/roll/op/overload", "os.system.x"), "not of the form"),
    "operator in place": (put("graph/nodes/roll/op/overload", "aten.relu_.default"), "pure"),
    "operator opens files": (
        put("graph/nodes/roll/op/overload", "aten.from_file.default"),
        "which no saved engine may",
    ),
    "source unlawful": (put("source/nodes/fc/inputs", ["nobody"]), "loading the source"),
}


class TestRefusals:
    @pytest.mark.parametrize("name", MUTATIONS)
    def test_altered_json(self, name: str) -> None:
        mutate, message = MUTATIONS[name]
        text, tensors = serial.encode(network(), on_meta(network()))
        document = msgspec.json.decode(text)
        mutate(document)
        with pytest.raises(GraphError, match=message):
            serial.decode(msgspec.json.encode(document), tensors, SIZES)

    @pytest.mark.parametrize(
        "text",
        [b"", b"{", b"null", b"[]", b"\xff", b"[" * 100_000, b'{"graph": {}, "source": {}}'],
        ids=repr,
    )
    def test_other_text(self, text: bytes) -> None:
        with pytest.raises(GraphError, match="not what this version of fastres writes"):
            serial.decode(text, {}, SIZES)

    def test_a_field_given_twice(self) -> None:
        text, tensors = serial.encode(network(), on_meta(network()))
        twice = text.replace(b'"groups":1', b'"groups":2,"groups":1')
        with pytest.raises(GraphError, match="not exactly those"):
            serial.decode(twice, tensors, SIZES)

    def test_a_call_that_pytorch_refuses(self) -> None:
        graph = network()
        op = roll(args='[{"input":0},[1],[7]]')
        nodes = [node.with_(op=op) if node.name == "roll" else node for node in graph.nodes]
        graph = graph.replace(nodes=tuple(nodes))
        with pytest.raises(GraphError, match="roll .* is refused by PyTorch"):
            round_trip(graph)

    def test_extra_tensor(self) -> None:
        text, tensors = serial.encode(network(), on_meta(network()))
        with pytest.raises(GraphError, match="do not hold the same tensors: extra"):
            serial.decode(text, {**tensors, "extra": tensor(1)}, SIZES)

    def test_kept_constants_that_are_not_there(self) -> None:
        text, tensors = serial.encode(network(), network())
        assert any(name.startswith("source:") for name in tensors)
        _, source, _ = serial.decode(text, tensors, SIZES)
        assert source.equals(network())
        document = msgspec.json.decode(text)
        document["kept"].pop()
        for data, given in (
            (msgspec.json.encode(document), tensors),
            (text, {k: t for k, t in tensors.items() if not k.startswith("source:")}),
        ):
            with pytest.raises(GraphError, match="constants kept of the source are not those"):
                serial.decode(data, given, SIZES)

    def test_tensor_of_a_dtype_outside_the_ir(self) -> None:
        text, tensors = serial.encode(network(), on_meta(network()))
        odd = tensors["conv.bias"].to(torch.complex64)
        with pytest.raises(GraphError, match="complex64"):
            serial.decode(text, {**tensors, "conv.bias": odd}, SIZES)

    @pytest.mark.parametrize("args", ["[", "{}", '[{"input":3}]', '[{"input":0},"a"]', "[]"])
    def test_a_call_with_impossible_arguments(self, args: str) -> None:
        text, tensors = serial.encode(network(), on_meta(network()))
        document = msgspec.json.decode(text)
        put("graph/nodes/roll/op/args", args)(document)
        with pytest.raises(GraphError):
            serial.decode(msgspec.json.encode(document), tensors, SIZES)

    @pytest.mark.parametrize("sizes", [[], [(2, 3, 9, 8)], [(2, 3, 8)], SIZES * 2], ids=repr)
    def test_sizes_that_do_not_fit(self, sizes: list[tuple[int, ...]]) -> None:
        text, tensors = serial.encode(network(), on_meta(network()))
        with pytest.raises(GraphError, match="input"):
            serial.decode(text, tensors, sizes)
