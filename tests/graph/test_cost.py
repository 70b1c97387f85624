"""fastres.graph.cost: the rules by which work is counted."""

from __future__ import annotations

from fastres import models
from fastres.graph.builder import ResNetSpec, build_graph
from fastres.graph.cost import multiply_adds, traffic
from fastres.graph.ir import Conv2d, Graph, Linear, Node, Normalize, Slice, Value
from fastres.graph.passes.pipeline import optimise
from fastres.graph.shapes import infer_shapes
from fastres.graph.specs import TensorSpec


def test_traffic() -> None:
    weights = models.cifar_resnet(8, seed=None).state_dict()
    graph = optimise(build_graph(weights, ResNetSpec()))
    shapes = infer_shapes(graph, [(2, 3, 32, 32)])

    def elements(name: str) -> int:
        return traffic(graph[name], shapes, graph, 1)

    x, y = 2 * 16 * 32 * 32, 2 * 32 * 16 * 16
    assert elements("conv1") == 2 * 3 * 32 * 32 + (3 * 9 * 16 + 16) + x
    assert elements("layer2.0.conv1") == x + (16 * 9 * 32 + 32) + y
    # the last convolution of a block reads the shortcut too
    assert elements("layer1.0.conv2") == x + x + (16 * 9 * 16 + 16) + x
    assert elements("avgpool") == 2 * 64 * 8 * 8 + 2 * 64
    assert elements("flatten") == 0
    assert elements("fc") == 2 * 64 + (64 * 10 + 10) + 2 * 10
    assert traffic(graph["fc"], shapes, graph, 2) == 2 * elements("fc")
    # the subsampling of shortcut A reads what it keeps
    cut = next(n for n in graph if isinstance(n.op, Slice) and n.name.startswith("layer2"))
    assert elements(cut.name) == 2 * (2 * 16 * 16 * 16)
    assert multiply_adds(cut, shapes, graph) == 0


def test_multiply_adds() -> None:
    """N*K*P*Q * (C/groups)*R*S, and nothing for what the papers do not count."""
    weights = models.cifar_resnet(8, seed=None).state_dict()
    graph = build_graph(weights, ResNetSpec())
    shapes = infer_shapes(graph, [(2, 3, 32, 32)])
    counted = {n.name: multiply_adds(n, shapes, graph) for n in graph if n.name in ("conv1", "fc")}
    assert counted == {"conv1": 2 * 16 * 32 * 32 * 27, "fc": 2 * 10 * 64}
    others = [n for n in graph if not isinstance(n.op, Conv2d | Linear)]
    assert len(others) > 10 and not any(multiply_adds(n, shapes, graph) for n in others)


def test_pictures_are_read_in_bytes() -> None:
    spec = TensorSpec((2, 3, 8, 8))
    op = Normalize((0.0,) * 3, (1.0,) * 3)
    node = Node("normalize", op, ("x",), spec)
    pixels = Value("x", TensorSpec(spec.shape, "uint8"))
    graph = Graph((pixels,), (node,), ("normalize",), {}, "")
    shapes = {name: (2, 3, 8, 8) for name in ("x", "normalize")}
    assert traffic(node, shapes, graph, 4) == 2 * 3 * 8 * 8 * 5
