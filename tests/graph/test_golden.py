"""Readable dumps of whole graphs: a change of any layer, name, fusion or size shows up as a diff.

After a change that is meant, write them anew with `python tests/graph/test_golden.py` and read the
diff.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision

from fastres import models
from fastres.calib.table import CalibrationTable, TensorRange
from fastres.calib.thresholds import ALGORITHMS
from fastres.graph.builder import ResNetSpec, build_graph
from fastres.graph.capture import capture
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.graph.passes.quantise import Placement, quantise
from fastres.graph.passes.split_residual import split_residual
from fastres.graph.quantisable import fingerprints, observed
from fastres.options import Input

GOLDEN = Path(__file__).parent / "golden"


def bottleneck(version: models.Version) -> Graph:
    model = models.ResNet(
        models.Bottleneck, (1, 2, 1, 1), version=version, planes=8, num_classes=5, seed=0
    )
    image = Input(((1, 3, 32, 32), (1, 3, 64, 64), (8, 3, 512, 512)))
    return optimise(build_graph(model.state_dict(), ResNetSpec(version), image))


def cifar() -> Graph:
    weights = models.cifar_resnet(20, shortcut="A", seed=0).state_dict()
    return optimise(build_graph(weights, ResNetSpec()))


def captured() -> Graph:
    return capture(torchvision.models.resnet18().eval(), [Input((1, 3, 224, 224))]).graph


def kept() -> Graph:
    """What the IR does not know, with sizes of the batch."""

    class Gate(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = x.amax((2, 3)).view(x.size(0), -1, 1, 1).clamp(max=torch.inf)
            return torch.roll(x * gate + 0.5, 1, 1)

    return capture(Gate().eval(), [Input(((1, 4, 8, 8), (1, 4, 8, 8), (1, 4, 9, 9)))]).graph


def quantised(placement: Placement) -> Graph:
    """With thresholds of a power of two, so that no machine's rounding is in the dump."""
    graph = bottleneck("v1.5")
    structure, weights = fingerprints(graph)
    names = observed(split_residual(graph))
    ranges = {
        name: TensorRange(127.0 / 2**i, dict.fromkeys(ALGORITHMS, 127.0 / 2**i))
        for i, name in enumerate(names)
    }
    keep = ("layer2.1.conv2",)
    table = CalibrationTable("minmax", 1, structure, weights, ranges, keep=keep)
    return quantise(graph, table, placement)


GRAPHS: dict[str, Callable[[], Graph]] = {
    "cifar20_a_optimised": cifar,
    "bottleneck_v1_optimised": lambda: bottleneck("v1"),
    "bottleneck_v1.5_optimised": lambda: bottleneck("v1.5"),
    "bottleneck_v1.5_int8_skip": lambda: quantised("skip"),
    "bottleneck_v1.5_int8_both": lambda: quantised("both"),
    "resnet18_captured": captured,
    "outside_the_ir_captured": kept,
}


@pytest.mark.parametrize("name", GRAPHS)
def test_dump(name: str) -> None:
    want = (GOLDEN / f"{name}.txt").read_text()
    assert str(GRAPHS[name]()) + "\n" == want, "if this is meant: see the top of this file"


def test_there_are_no_others() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(GRAPHS)


if __name__ == "__main__":
    for name, make in GRAPHS.items():
        (GOLDEN / f"{name}.txt").write_text(f"{make()}\n")
