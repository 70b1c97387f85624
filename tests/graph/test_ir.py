"""fastres.graph.ir: what a graph answers about itself, and how it reads."""

from __future__ import annotations

import pytest
import torch
import torch.utils._pytree as pytree

from fastres.graph.ir import (
    Activation,
    Add,
    Aten,
    BatchNorm,
    Conv2d,
    Graph,
    MaxPool,
    Node,
    Pad,
    Slice,
    Value,
    op_name,
)
from fastres.graph.specs import DTYPE_NAMES, DTYPES, Sym, TensorSpec, spec_of
from fastres.graph.trees import LEAF
from fastres.kernels.epilogue import Epilogue

N = Sym("N")
SPEC = TensorSpec((N, 2, 4, 4))
ROLL = Aten("aten.roll.default", '[{"input":0},[1],[1]]', "{}", SPEC)


def graph() -> Graph:
    return Graph(
        inputs=(Value("x", SPEC),),
        nodes=(
            Node("conv", Conv2d(), ("x",), SPEC, {"weight": "w"}),
            Node("relu", Activation("relu"), ("conv",), SPEC),
            Node("add", Add(), ("relu", "conv"), SPEC, origin=("plus", "act")),
            Node("twice", Add(), ("add", "add"), SPEC),
        ),
        outputs=("twice", "relu"),
        constants={"w": torch.ones(2, 2, 1, 1)},
        output_tree=LEAF,
    )


def test_names_find_nodes() -> None:
    found = graph()
    assert found["relu"].op == Activation("relu")
    assert "relu" in found and "x" not in found and "w" not in found
    assert [node.name for node in found] == ["conv", "relu", "add", "twice"]


def test_specs_of_every_value() -> None:
    assert graph().spec("x") == graph().spec("add") == SPEC
    assert str(graph().spec("w")) == "f32[2, 2, 1, 1]"
    with pytest.raises(KeyError, match="nobody"):
        graph().spec("nobody")


def test_users() -> None:
    found = graph()
    users = found.users()
    assert {name: [n.name for n in nodes] for name, nodes in users.items()} == {
        "x": ["conv"],
        "conv": ["relu", "add"],
        "relu": ["add"],
        "add": ["twice", "twice"],
    }
    assert found.sole_user(users, "x") is found["conv"]
    assert found.sole_user(users, "conv") is None  # two nodes
    assert found.sole_user(users, "relu") is None  # an output besides
    assert found.sole_user(users, "add") is None  # one node, twice
    assert found.sole_user(users, "twice") is None  # no node


def test_origins() -> None:
    assert graph()["add"].origins == ("plus", "act")
    assert graph()["relu"].origins == ("relu",)


def test_replace_finds_the_new_nodes() -> None:
    after = graph().replace(nodes=graph().nodes[:1])
    assert "relu" not in after and "conv" in after


class TestEquals:
    def test_a_copy(self) -> None:
        other = graph().replace(constants={"w": torch.ones(2, 2, 1, 1)})
        assert graph().equals(other)

    @pytest.mark.parametrize(
        "changes",
        [
            {"constants": {"w": torch.zeros(2, 2, 1, 1)}},
            {"constants": {"w": torch.ones(2, 2, 1, 1, dtype=torch.float64)}},
            {"constants": {"w": torch.ones(4)}},
            {"constants": {}},
            {"outputs": ("twice",)},
            {"output_tree": pytree.tree_structure([0])},
            {"nodes": graph().nodes[:3]},
            {"nodes": (graph()["conv"].with_(name="c"), *graph().nodes[1:])},
            {"inputs": (Value("y", SPEC),)},
        ],
        ids=lambda c: ",".join(c),
    )
    def test_not_another(self, changes: dict[str, object]) -> None:
        assert not graph().equals(graph().replace(**changes))


class TestText:
    def test_a_graph(self) -> None:
        assert str(graph()).splitlines() == [
            "x: f32[N, 2, 4, 4] = input",
            "conv: f32[N, 2, 4, 4] = conv2d(x, weight=f32[2, 2, 1, 1])",
            "relu: f32[N, 2, 4, 4] = activation(conv, kind=relu)",
            "add: f32[N, 2, 4, 4] = add(relu, conv)  # plus + act",
            "twice: f32[N, 2, 4, 4] = add(add, add)",
            "return twice, relu",
        ]

    @pytest.mark.parametrize(
        ("op", "text"),
        [
            (
                Conv2d((2, 2), (1, 1), groups=2),
                "conv2d(x, stride=(2, 2), padding=(1, 1), groups=2)",
            ),
            (Conv2d(epilogue=Epilogue(True, "silu")), "conv2d(x, epilogue=+residual+silu)"),
            (BatchNorm(1e-3), "batchnorm(x, eps=0.001)"),
            (MaxPool((3, 3), (2, 2)), "maxpool(x, kernel=(3, 3), stride=(2, 2))"),
            (Pad((0, 1), (0, 2)), "pad(x, before=(0, 1), after=(0, 2))"),
            (Slice((0,), (None,), (2,)), "slice(x, starts=(0,), stops=(None,), steps=(2,))"),
            (ROLL, 'aten.roll.default(x, args=[{"input":0},[1],[1]], kwargs={})'),
        ],
        ids=lambda p: op_name(p) if not isinstance(p, str) else "",
    )
    def test_settings_that_are_not_the_default(self, op: object, text: str) -> None:
        node = Node("y", op, ("x",), TensorSpec((4,)))  # type: ignore[arg-type]
        alone = Graph((), (node,), (), {}, "")
        assert str(alone).splitlines()[0] == f"y: f32[4] = {text}"

    @pytest.mark.parametrize(
        ("dtype", "short"),
        [
            ("float64", "f64"),
            ("bfloat16", "bf16"),
            ("uint8", "u8"),
            ("int32", "i32"),
            ("bool",) * 2,
        ],
    )
    def test_dtypes(self, dtype: str, short: str) -> None:
        assert str(TensorSpec((1, N), dtype)) == f"{short}[1, N]"


def test_dtypes_have_one_name_each() -> None:
    assert {DTYPES[name]: name for name in DTYPES} == DTYPE_NAMES
    for dtype in DTYPES.values():
        assert spec_of(torch.empty(2, dtype=dtype)).torch_dtype == dtype
