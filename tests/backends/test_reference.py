"""The reference backend: it is PyTorch, node by node."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastres
from fastres.backends.reference import ReferenceExecutable
from fastres.graph.capture import capture
from fastres.graph.passes.pipeline import optimise


def test_unoptimised_graph_is_the_model_bit_for_bit(
    photo_batch: Callable[[int, int], Tensor],
) -> None:
    x = photo_batch(2, 32)
    model = fastres.models.settle(fastres.models.cifar_resnet(20), photo_batch(8, 32))
    graph = capture(model, [fastres.Input((2, 3, 32, 32))]).graph
    with torch.no_grad():
        assert torch.equal(ReferenceExecutable(graph, torch.float32).run([x])[0], model(x))
        double = ReferenceExecutable(optimise(graph), torch.float64).values([x])
        want = model.double()(x.double())
    assert torch.allclose(double[graph.outputs[0]], want, rtol=1e-5, atol=1e-6)


def test_engine_on_the_reference_backend(photo_batch: Callable[[int, int], Tensor]) -> None:
    model = fastres.models.settle(fastres.models.preact_resnet(20), photo_batch(8, 32))
    x = photo_batch(3, 32)
    engine = fastres.compile(model, x, backend="reference")
    report = fastres.verify(model, engine, [x], layerwise=True)
    assert report.passed, str(report)
    assert {node.precision for node in engine.info.nodes} == {"fp32"}
    assert len(engine.profile(x).rows) == len(engine.graph.nodes)


def test_output_is_no_alias_of_the_input() -> None:
    engine = fastres.compile(
        torch.nn.Flatten().eval(), torch.zeros(2, 3, 4, 4), backend="reference"
    )
    x = torch.ones(2, 3, 4, 4)
    y = engine(x)
    y.zero_()
    assert x.sum() == 96
