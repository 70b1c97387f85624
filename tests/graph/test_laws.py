"""fastres.graph.laws: each law, broken once, is named with the node and the step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastres.backends.reference import evaluate
from fastres.errors import GraphError
from fastres.graph import laws
from fastres.graph.ir import (
    Activation,
    Add,
    Aten,
    AvgPool,
    BatchNorm,
    Concat,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Mul,
    Node,
    Normalize,
    Op,
    Pad,
    Slice,
    Softmax,
    Value,
    op_name,
)
from fastres.graph.shapes import node_shape
from fastres.graph.specs import Sym, TensorSpec
from fastres.graph.trees import LEAF
from fastres.kernels.epilogue import Epilogue

N, H = Sym("N"), Sym("H")
IMAGE = TensorSpec((N, 4, H, 8))


def lawful() -> Graph:
    """x → conv → norm → relu → relu + x."""
    return Graph(
        inputs=(Value("x", IMAGE),),
        nodes=(
            Node("conv", Conv2d(), ("x",), IMAGE, {"weight": "w"}),
            Node("norm", BatchNorm(), ("conv",), IMAGE, {"mean": "c", "var": "c"}),
            Node("relu", Activation("relu"), ("norm",), IMAGE),
            Node("add", Add(), ("relu", "x"), IMAGE),
        ),
        outputs=("add",),
        constants={"w": torch.zeros(4, 4, 1, 1), "c": torch.ones(4)},
        output_tree=LEAF,
    )


def with_node(name: str, /, **changes: object) -> Graph:
    graph = lawful()
    nodes = [node.with_(**changes) if node.name == name else node for node in graph.nodes]
    return graph.replace(nodes=tuple(nodes))


def with_input(spec: TensorSpec) -> Graph:
    return lawful().replace(inputs=(Value("x", spec),))


EVERYWHERE: list[Op] = [  # that need no parameters
    *(Activation(kind) for kind in ("relu", "sigmoid", "gelu", "hardswish", "silu")),
    *(Add(kind) for kind in (None, "relu", "sigmoid")),
    *(Mul(), MaxPool((2, 2), (2, 2)), AvgPool((2, 2), (2, 2)), GlobalAvgPool(), Flatten(1)),
    *(Concat(1), Pad((0, 0, 1, 1), (0, 0, 1, 1)), Softmax(1)),
    Slice((0, 0, 0, 0), (None,) * 4, (1, 1, 1, 2)),
]


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "int32", "int64"])
@pytest.mark.parametrize("op", EVERYWHERE, ids=str)
def test_whole_numbers_go_where_pytorch_takes_them(op: Op, dtype: str) -> None:
    given = TensorSpec((2, 3, 4, 4), dtype)
    names = ("x",) * (2 if isinstance(op, Add | Mul | Concat) else 1)
    graph = Graph((Value("x", given),), (), ("y",), {}, LEAF)
    shape = node_shape(graph, Node("y", op, names, given), {"x": given.shape})
    graph = graph.replace(nodes=(Node("y", op, names, TensorSpec(shape, dtype)),))
    try:
        value = evaluate(graph["y"], {"x": torch.ones(given.shape).to(given.torch_dtype)}, {})
        computed = value.dtype == given.torch_dtype
    except (NotImplementedError, RuntimeError):
        computed = False
    if computed:
        laws.check(graph)
    else:
        with pytest.raises(GraphError, match=f"y: PyTorch has no {op_name(op)} of "):
            laws.check(graph)


def test_lawful() -> None:
    graph = lawful()
    assert laws.check(graph) is graph


def swapped() -> Graph:
    a, b, *rest = lawful().nodes
    return lawful().replace(nodes=(b, a, *rest))


def twice_the_input() -> Graph:
    return lawful().replace(inputs=(Value("x", IMAGE), Value("x", IMAGE)))


def roll(dtype: str) -> Graph:
    op = Aten("aten.roll.default", '[{"input":0},[1],[1]]', "{}", TensorSpec(IMAGE.shape, dtype))
    return with_node("relu", op=op, spec=TensorSpec(IMAGE.shape, dtype))


def normalising(made: str = "float32", **changes: object) -> Graph:
    """x → normalize, of pictures."""
    op, pixels = Normalize((0.0,) * 3, (1.0,) * 3), TensorSpec((N, 3, H, 8), "uint8")
    node = Node("normalize", op, ("x",), TensorSpec(pixels.shape, made))
    graph = Graph((Value("x", pixels),), (node,), ("normalize",), {}, LEAF)
    return graph.replace(**changes)


def pixels_read_twice() -> Graph:
    graph = normalising()
    spec = graph.inputs[0].spec
    roll = Aten("aten.roll.default", '[{"input":0},[1],[1]]', "{}", spec)
    return graph.replace(nodes=(*graph.nodes, Node("roll", roll, ("x",), spec)))


half = TensorSpec(IMAGE.shape, "float16")
tall = TensorSpec((N, 4, Sym("H", 1), 8))

# the law, who breaks it, what the message says
BROKEN: dict[str, tuple[Callable[[], Graph], str]] = {
    "a name given twice": (lambda: with_node("norm", name="conv"), "the name conv is used twice"),
    "a node named as an input": (lambda: with_node("conv", name="x"), "the name x is used twice"),
    "a node named as a constant": (lambda: with_node("conv", name="w"), "the name w is used twice"),
    "an input given twice": (twice_the_input, "the name x is used twice"),
    "an input named as a constant": (
        lambda: lawful().replace(constants={**lawful().constants, "x": torch.ones(1)}),
        "the name x is used twice",
    ),
    "reading what is not there": (
        lambda: with_node("relu", inputs=("nobody",)),
        "relu reads nobody, which nothing before it produces",
    ),
    "reading what comes later": (swapped, "norm reads conv, which nothing before it produces"),
    "reading oneself": (lambda: with_node("relu", inputs=("relu",)), "relu reads relu"),
    "an output of nobody": (lambda: lawful().replace(outputs=("nobody",)), "output nobody"),
    "an output that is a constant": (lambda: lawful().replace(outputs=("w",)), "output w"),
    "more outputs than leaves": (
        lambda: lawful().replace(outputs=("add", "relu")),
        "2 outputs, but the output tree has 1 leaves",
    ),
    "fewer outputs than leaves": (lambda: lawful().replace(outputs=()), "0 outputs"),
    "another shape": (
        lambda: with_node("relu", spec=tall),
        r"relu claims f32\[N, 4, H\+1, 8\], the shape rules say \[N, 4, H, 8\]",
    ),
    "a fixed size for an open one": (
        lambda: with_node("relu", spec=TensorSpec((2, 4, H, 8))),
        r"relu claims f32\[2, 4, H, 8\]",
    ),
    "a shape that fits no rule": (
        lambda: with_input(TensorSpec((N, 5, H, 8))),
        "conv: .* needs 4 channels",
    ),
    "another dtype": (lambda: with_node("relu", spec=half), "relu claims f16.* inputs are float32"),
    "inputs of two dtypes": (lambda: with_input(half), "conv claims f32.* inputs are float16"),
    "too many inputs": (
        lambda: with_node("relu", inputs=("norm", "x")),
        "relu cannot take 2 inputs, but 1",
    ),
    "too few inputs": (lambda: with_node("add", inputs=("x",)), "add cannot take 1 inputs, but 2"),
    "no inputs": (lambda: with_node("add", op=Mul(), inputs=()), "add cannot take 0 inputs, but 2"),
    "nothing to join": (
        lambda: with_node("add", op=Concat(), inputs=()),
        "add: .* cannot take : its dim is 1",
    ),
    "no residual": (
        lambda: with_node("conv", op=Conv2d(epilogue=Epilogue(residual=True))),
        "conv cannot take 1 inputs, but 2",
    ),
    "a residual for nobody": (lambda: with_node("conv", inputs=("x", "x")), "conv cannot take 2"),
    "no weight": (lambda: with_node("conv", params={}), "conv has parameters .*, needs .*weight"),
    "a slot too many": (
        lambda: with_node("relu", params={"weight": "w"}),
        r"relu has parameters \['weight'\]",
    ),
    "a slot unknown": (
        lambda: with_node("norm", params={"mean": "c", "var": "c", "gain": "c"}),
        "norm has parameters",
    ),
    "a constant that is not there": (
        lambda: with_node("conv", params={"weight": "v"}),
        "conv.weight is v, which is no constant",
    ),
    "a misshapen bias": (
        lambda: with_node("conv", params={"weight": "w", "bias": "w"}),
        "conv: .* needs one value per channel",
    ),
    "an operation for another rank": (
        lambda: with_node("norm", op=Linear(), params={"weight": "w"}),
        "norm: .* too many values",
    ),
    "normalised floats": (
        lambda: normalising(inputs=(Value("x", TensorSpec((N, 3, H, 8))),)),
        "normalize must alone read an input in uint8",
    ),
    "normalised to bytes": (lambda: normalising(made="uint8"), "normalize must .* floating"),
    "normalised and read again": (pixels_read_twice, "normalize must alone read"),
    "normalised and returned": (
        lambda: normalising(outputs=("x",)),
        "normalize must alone read",
    ),
    "normalised, of four channels": (
        lambda: normalising(inputs=(Value("x", TensorSpec((N, 4, H, 8), "uint8")),)),
        "pictures of 3 channels",
    ),
    "an input that is an expression": (
        lambda: with_input(tall),
        r"input x is f32\[N, 4, H\+1, 8\]; its sizes must be bare symbols",
    ),
}


@pytest.mark.parametrize("law", BROKEN)
def test_broken(law: str) -> None:
    breaks, message = BROKEN[law]
    with pytest.raises(GraphError, match=f"^after the step: .*{message}"):
        laws.check(breaks(), "the step")


def test_the_step_is_capture_where_none_is_named() -> None:
    with pytest.raises(GraphError, match="^after capture: "):
        laws.check(swapped())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_aten_call_may_have_any_dtype(dtype: str) -> None:
    graph = roll(dtype)
    if dtype == "float16":
        with pytest.raises(GraphError, match="add claims f32"):  # but nobody may mix them
            laws.check(graph)
        graph = graph.replace(nodes=graph.nodes[:3], outputs=("relu",))
    laws.check(graph)


def test_pictures_are_normalised() -> None:
    laws.check(normalising())
    laws.check(normalising(made="float16"))


def test_a_graph_that_computes_nothing() -> None:
    laws.check(lawful().replace(nodes=(), outputs=("x",)))
