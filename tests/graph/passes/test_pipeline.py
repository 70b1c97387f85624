"""optimise: all passes in order, checked after each."""

from __future__ import annotations

import cProfile
import pstats
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastres import models
from fastres.errors import GraphError
from fastres.graph.builder import ResNetSpec, build_graph
from fastres.graph.ir import Activation, Add, BatchNorm, Conv2d, Graph, Node, Value
from fastres.graph.passes import pipeline
from fastres.graph.passes.pipeline import PIPELINE, optimise
from fastres.graph.specs import Sym, TensorSpec
from fastres.graph.trees import LEAF

Make = Callable[..., Graph]


def bottleneck(version: models.Version, shortcut: models.Shortcut = "B") -> nn.Module:
    return models.ResNet(
        models.Bottleneck,
        (1, 1, 2),
        version=version,
        num_classes=5,
        shortcut=shortcut,
        planes=8,
        seed=0,
    ).eval()


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
@pytest.mark.parametrize("version", ["v1", "v1.5"])
def test_a_bottleneck_net_is_convolutions_alone(
    version: models.Version, shortcut: models.Shortcut
) -> None:
    model = bottleneck(version, shortcut)
    graph = optimise(build_graph(model.state_dict(), ResNetSpec(version)))
    counted = Counter(type(node.op).__name__ for node in graph)
    assert counted["BatchNorm"] == counted["Add"] == counted["Activation"] == 0
    projections = {"A": 0, "B": 3, "C": 4}[shortcut]
    assert counted["Conv2d"] == 1 + 4 * 3 + projections
    assert counted["Slice"] == (2 if shortcut == "A" else 0)


def test_origins_are_the_captured_nodes_in_order() -> None:
    graph = build_graph(bottleneck("v1").state_dict(), ResNetSpec("v1"))
    after = optimise(graph)
    origins = [name for node in after for name in node.origins]
    assert sorted(origins) == sorted(node.name for node in graph)
    place = {node.name: i for i, node in enumerate(graph)}
    for node in after:
        assert list(node.origins) == sorted(node.origins, key=place.__getitem__)
        assert after.spec(node.name) == graph.spec(node.origins[-1])


def test_twice_changes_nothing() -> None:
    graph = optimise(build_graph(bottleneck("v1").state_dict(), ResNetSpec("v1")))
    assert optimise(graph).equals(graph)


def test_the_dump_sees_every_pass(graph_of: Make) -> None:
    seen: list[tuple[str, int]] = []
    graph = graph_of(lambda s, x: F.relu(s.n(s.a(x)) + x))
    optimise(graph, lambda name, after: seen.append((name, len(after.nodes))))
    assert seen == [
        ("drop_dead", 4),
        ("fold_constants", 4),
        ("merge_slices", 4),
        ("read_batchnorm", 4),
        ("fold_batchnorm", 3),
        ("fold_batchnorm_ahead", 3),
        ("fuse_residual", 2),
        ("fuse_activation", 1),
        ("drop_dead", 1),
    ]


def test_a_faulty_pass_is_named(monkeypatch: pytest.MonkeyPatch, graph_of: Make) -> None:
    def forgetful(graph: Graph) -> Graph:
        return graph.replace(nodes=graph.nodes[1:])

    monkeypatch.setattr(pipeline, "PIPELINE", (*PIPELINE[:2], forgetful))
    with pytest.raises(GraphError, match="after forgetful: n reads a, which nothing"):
        optimise(graph_of(lambda s, x: s.n(s.a(x))))


@pytest.mark.parametrize("depth", [302, 602])
def test_is_linear(depth: int) -> None:
    """Counted, not timed: what the passes look at grows as the network does."""
    per_layer = calls(depth) / depth
    assert per_layer < 1.1 * calls(152) / 152


def calls(depth: int) -> int:
    """Python calls that `optimise` makes on a network without weights of any size."""
    graph = chain(depth)
    profile = cProfile.Profile()
    profile.runcall(optimise, graph)
    return pstats.Stats(profile).total_calls  # type: ignore[attr-defined,no-any-return]


def chain(depth: int) -> Graph:
    """depth/2 residual blocks of one channel."""
    spec = TensorSpec((Sym("N"), 1, 4, 4))
    nodes: list[Node] = []
    last = "x"
    params = {"mean": "c", "var": "c"}
    for i in range(depth // 2):
        names = [f"{i}.{part}" for part in ("a", "an", "ar", "b", "bn", "add", "relu")]
        a, an, ar, b, bn, add, relu = names
        nodes += [
            Node(a, Conv2d(), (last,), spec, {"weight": "w"}),
            Node(an, BatchNorm(), (a,), spec, params),
            Node(ar, Activation("relu"), (an,), spec),
            Node(b, Conv2d(), (ar,), spec, {"weight": "w"}),
            Node(bn, BatchNorm(), (b,), spec, params),
            Node(add, Add(), (bn, last), spec),
            Node(relu, Activation("relu"), (add,), spec),
        ]
        last = relu
    constants = {"w": torch.ones(1, 1, 1, 1), "c": torch.ones(1)}
    return Graph((Value("x", spec),), tuple(nodes), (last,), constants, LEAF)
