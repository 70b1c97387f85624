"""fastres.parity.layers: every fault is named by the first layer past its bound, and bisected."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastres import models
from fastres.compiler import compile
from fastres.engine.engine import Engine
from fastres.errors import InputError, ParityError
from fastres.graph.ir import Conv2d
from fastres.kernels.epilogue import Epilogue
from fastres.parity.report import ParityReport
from fastres.parity.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")


def stride_to_the_3x3(block: Any) -> None:
    block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)


def swap_channels(weight: Tensor) -> None:
    with torch.no_grad():
        weight[:, [0, 1]] = weight[:, [1, 0]].clone()


@dataclass(frozen=True)
class Mutation:
    """One small fault put into a model; `rms` is the error of the logits it causes (measured).

    An untouched engine has an RMS error of 1.3e-6 and is allowed 2.6e-6.
    """

    apply: Callable[[Any], object]
    first: str
    rms: float


MUTATIONS = {
    "drop one mean": Mutation(
        lambda net: net.layer2[0].bn1.running_mean[:1].zero_(), "layer2.0.conv1", 1.4e-1
    ),
    "drop the means": Mutation(
        lambda net: net.layer2[0].bn1.running_mean.zero_(), "layer2.0.conv1", 5.1e-1
    ),
    "drop beta": Mutation(
        lambda net: nn.init.zeros_(net.layer2[0].bn1.bias), "layer2.0.conv1", 2.8e-1
    ),
    "epsilon 1e-4 for 1e-5": Mutation(
        lambda net: setattr(net.layer2[0].bn1, "eps", 1e-4), "layer2.0.conv1", 2.5e-5
    ),
    "v1 for v1.5": Mutation(lambda net: stride_to_the_3x3(net.layer2[0]), "layer2.0.conv1", 5.8e-1),
    "swap two channels": Mutation(
        lambda net: swap_channels(net.layer2[0].conv2.weight), "layer2.0.conv2", 3.7e-1
    ),
    "drop beta in a shortcut": Mutation(
        lambda net: nn.init.zeros_(net.layer3[0].downsample[1].bias),
        "layer3.0.downsample.0",
        1.4e-1,
    ),
    "drop one bias of the head": Mutation(
        lambda net: nn.init.zeros_(net.fc.bias[:1]), "fc", 1.2e-2
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_every_mutation_turns_parity_red_and_is_found(
    mutation: Mutation, net: nn.Module, images: Tensor
) -> None:
    mutant = copy.deepcopy(net)
    mutation.apply(mutant)
    with compile(mutant, images, backend="cpu") as engine:
        report = verify(net, engine, images, layerwise=True, bisect=True)
    assert_found(report, mutation.first, mutation.rms)


def test_a_fusion_that_loses_a_relu_is_found(
    net: nn.Module, engine: Engine, images: Tensor
) -> None:
    """A fault of a pass, not of the model: the node still claims to stand for the ReLU too."""
    node = engine.graph["layer2.0.conv2"]
    assert isinstance(node.op, Conv2d) and node.op.epilogue.activation == "relu"
    lossy = node.with_(op=Conv2d(node.op.stride, node.op.padding, epilogue=Epilogue()))
    nodes = tuple(lossy if other is node else other for other in engine.graph)
    with compile(engine.graph.replace(nodes=nodes), backend="cpu") as broken:
        report = verify(net, broken, images, layerwise=True, bisect=True)
    assert_found(report, "layer2.0.conv2", LOST_RELU)


LOST_RELU = 1.07  # measured


def assert_found(report: ParityReport, first: str, rms: float) -> None:
    """Red, by about this error, first at this node, and because of this node."""
    (output,) = report.outputs
    assert not report.passed and not output.passed
    assert output.rms == pytest.approx(rms, rel=0.3)
    assert report.first_failing_layer is not None and report.first_failing_layer.name == first
    assert report.bisection is not None and report.bisection.node.name == first
    assert report.bisection.wrong_node
    assert report.bisection.lowerings <= math.ceil(math.log2(len(report.layers))) + 4
    with pytest.raises(ParityError, match=f"first layer beyond its bound: {first}: "):
        report.raise_if_failed()


def test_bisection_tells_what_adds_up_from_a_wrong_node(net: nn.Module, images: Tensor) -> None:
    """Epsilon 1.03e-5 everywhere: 1.4e-7 a node, which is right, 6.6e-6 in the logits."""
    drifting = copy.deepcopy(net)
    for module in drifting.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1.03e-5
    with compile(drifting, images, backend="reference") as engine:
        report = verify(net, engine, images, bisect=True)
    assert not report.passed and report.outputs[0].rms < 1e-5
    assert report.bisection is not None and not report.bisection.wrong_node
    assert report.bisection.node.rms > 10 * report.bisection.isolated.rms
    assert "alone it is within bounds" in str(report)


def test_the_worst_batch_is_bisected(net: nn.Module, images: Tensor) -> None:
    """The first batch is black, so that a swap of input channels shows in the second only."""
    mutant = copy.deepcopy(net)
    swap_channels(mutant.conv1.weight)
    with compile(mutant, images, backend="cpu") as engine:
        black = torch.zeros_like(images)
        assert verify(net, engine, black).passed
        report = verify(net, engine, [black, images], bisect=True)
    assert report.bisection is not None and report.bisection.node.name == "conv1"


def test_layers_of_another_model_are_refused(engine: Engine, images: Tensor) -> None:
    other = models.cifar_resnet(8, seed=0).eval()
    with pytest.raises(InputError, match="compiled from the same model"):
        verify(other, engine, images, layerwise=True)


class WithTanh(nn.Module):
    """Holds an operation that the CPU backend refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).tanh())
        return out


def test_engines_with_fallbacks_are_looked_into(images: Tensor) -> None:
    torch.manual_seed(0)
    model = WithTanh().eval()
    mutant = copy.deepcopy(model)
    nn.init.zeros_(mutant.b.bias)
    options: Any = {"backend": "cpu", "on_unsupported": "fallback"}
    with compile(model, images, **options) as engine:
        assert engine.info.fallbacks
        assert verify(model, engine, images, layerwise=True).passed
    with compile(mutant, images, **options) as engine:
        report = verify(model, engine, images, layerwise=True, bisect=True)
    assert report.bisection is not None and report.bisection.node.name == "b"
