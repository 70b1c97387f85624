"""fastres.summary: the papers' numbers, and PyTorch's own counter as a second opinion."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastres import models
from fastres.compiler import compile
from fastres.errors import CaptureError, GraphError, InputError
from fastres.graph.builder import ResNetSpec, build_graph
from fastres.graph.ir import Graph
from fastres.options import Input
from fastres.summaries import summary

Factory = Callable[..., nn.Module]


@dataclass(frozen=True)
class Case:
    """A network at 224 x 224: parameters and multiply-adds as commonly published."""

    name: str
    version: str
    parameters: int
    macs: int

    def __str__(self) -> str:
        return f"{self.name}-{self.version}"

    @property
    def factory(self) -> Factory:
        return getattr(models, self.name)


CASES = (
    Case("resnet18", "v1.5", 11_689_512, 1_814_073_344),
    Case("resnet34", "v1.5", 21_797_672, 3_663_761_408),
    Case("resnet50", "v1", 25_557_032, 3_857_973_248),
    Case("resnet50", "v1.5", 25_557_032, 4_089_184_256),
    Case("resnet101", "v1.5", 44_549_160, 7_801_405_440),
    Case("resnet152", "v1.5", 60_192_808, 11_513_626_624),
)
PAPER = {"resnet18": 1.8, "resnet34": 3.6, "resnet50": 3.8, "resnet101": 7.6, "resnet152": 11.3}


def on_meta(factory: Factory, **options: object) -> nn.Module:
    with torch.device("meta"):
        return factory(**options).eval()


def built(model: nn.Module, image: Input | None = None, **spec: Any) -> Graph:
    """A graph of zeros: the numbers here depend on shapes alone."""
    weights = {
        name: torch.zeros(tensor.shape)
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
    return build_graph(weights, ResNetSpec(**{"version": "v1.5", **spec}), image)


@cache
def graph_of(case: Case) -> Graph:
    return built(on_meta(case.factory), version=case.version)


def counted_by_pytorch(model: nn.Module, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(shape, device="meta"))
    return counter.get_total_flops() // 2


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return models.resnet18(seed=None).eval()


class TestNumbers:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_of_the_papers(self, case: Case) -> None:
        found = summary(graph_of(case))
        assert found.input_shapes == ((1, 3, 224, 224),)
        assert found.parameters == case.parameters
        assert found.macs == case.macs
        if case.name != "resnet50" or case.version == "v1":
            assert found.macs / 1e9 == pytest.approx(PAPER[case.name], rel=0.03)

    def test_v1_and_v15(self) -> None:
        """7.716 and 8.178 GFLOP: v1.5 moves the stride behind the first 1x1."""
        found = {case.version: case.macs for case in CASES if case.name == "resnet50"}
        assert round(2 * found["v1"] / 1e9, 3) == 7.716
        assert round(2 * found["v1.5"] / 1e9, 3) == 8.178

    def test_shape_flow(self) -> None:
        """224 → 112 → 56 → 28 → 14 → 7."""
        layers = {layer.name: layer for layer in summary(graph_of(CASES[3])).layers}
        flow = {
            "conv1": (64, 112, 112),
            "maxpool": (64, 56, 56),
            "layer1.2.conv3": (256, 56, 56),
            "layer2.3.conv3": (512, 28, 28),
            "layer3.5.conv3": (1024, 14, 14),
            "layer4.2.conv3": (2048, 7, 7),
            "avgpool": (2048, 1, 1),
            "flatten": (2048,),
            "fc": (1000,),
        }
        assert {name: layers[name].output_shape[1:] for name in flow} == flow

    def test_a_bottleneck_needs_a_seventeenth_of_the_weights(self) -> None:
        """At 256 channels: two 3x3 against 1x1, 3x3, 1x1 over 64."""

        def convs(*layers: nn.Module) -> int:
            return summary(nn.Sequential(*layers).eval(), (1, 256, 8, 8)).parameters

        plain = convs(*(nn.Conv2d(256, 256, 3, padding=1, bias=False) for _ in range(2)))
        bottleneck = convs(
            nn.Conv2d(256, 64, 1, bias=False),
            nn.Conv2d(64, 64, 3, padding=1, bias=False),
            nn.Conv2d(64, 256, 1, bias=False),
        )
        assert (plain, bottleneck) == (1_179_648, 69_632)

    @pytest.mark.parametrize(
        ("factory", "options", "spec", "shape"),
        [
            (models.resnet50, {"version": "v1"}, {"version": "v1"}, (1, 3, 224, 224)),
            (models.resnext50_32x4d, {}, {}, (1, 3, 224, 224)),
            (models.wide_resnet50_2, {}, {}, (2, 3, 160, 96)),
            (
                models.resnet50,
                {"replace_stride_with_dilation": (False, True, True)},
                {"dilate": (False, True, True)},
                (1, 3, 224, 224),
            ),
            (models.cifar_resnet, {"depth": 20}, {}, (3, 3, 32, 32)),
        ],
        ids=["v1", "resnext", "wide", "dilated", "cifar"],
    )
    def test_as_pytorch_counts(
        self,
        factory: Factory,
        options: dict[str, object],
        spec: dict[str, object],
        shape: tuple[int, ...],
    ) -> None:
        model = on_meta(factory, **options)
        found = summary(built(model, Input(shape), **spec), shape)
        assert found.macs == counted_by_pytorch(model, shape)
        assert found.parameters == sum(p.numel() for p in model.parameters())


class TestForms:
    def test_model_graph_and_engine_agree(self, resnet18: nn.Module) -> None:
        of_model = summary(resnet18)
        of_graph = summary(graph_of(CASES[0]))
        with compile(resnet18, backend="reference") as engine:
            of_engine, fused = summary(engine), summary(engine.graph)
        assert of_model == of_graph == of_engine
        assert fused.macs == of_model.macs
        assert len(fused.layers) < len(of_model.layers)
        # folding turns weight and bias of each BatchNorm into the convolution's bias
        scales = sum(layer.parameters // 2 for layer in of_model.layers if layer.op == "batchnorm")
        assert fused.parameters == of_model.parameters - scales

    def test_sizes(self) -> None:
        model = models.cifar_resnet(8, seed=None).eval()
        at_32 = summary(model, (1, 3, 32, 32))
        assert summary(model, Input(((1, 3, 16, 16), (1, 3, 32, 32), (9, 3, 64, 64)))) == at_32
        graph = built(model, Input(((1, 3, 16, 16), (1, 3, 32, 32), (9, 3, 64, 64))))
        assert summary(graph, (1, 3, 32, 32)) == at_32
        assert summary(graph).input_shapes == ((1, 3, 224, 224),)
        head = graph.constants["fc.weight"].numel()
        assert summary(graph, (4, 3, 32, 32)).macs == 4 * at_32.macs
        assert summary(graph, (1, 3, 64, 64)).macs - head == 4 * (at_32.macs - head)
        with pytest.raises(GraphError, match="input x has shape"):
            summary(graph, (1, 4, 32, 32))

    def test_text_and_json(self, resnet18: nn.Module) -> None:
        found = summary(resnet18)
        text = str(found)
        assert "layer4.1.conv2" in text and "1x512x7x7" in text and "2,359,296" in text
        assert "11,689,512 parameters, 1,814,073,344 multiply-adds (3.628 GFLOP)" in text
        assert json.loads(found.to_json()) == json.loads(json.dumps(found.to_dict()))
        assert found.to_dict()["layers"][0]["macs"] == 118_013_952

    def test_refusals(self, resnet18: nn.Module) -> None:
        with pytest.raises(CaptureError, match="training mode"):
            summary(models.resnet18(seed=None))
        with pytest.raises(CaptureError, match="cannot export"):
            summary(resnet18, (1, 5, 224, 224))
        with pytest.raises(InputError, match="str, not an nn.Module"):
            summary("resnet18")  # type: ignore[arg-type]
        for size in (5, torch.zeros(1, 3, 32, 32)):
            with pytest.raises(InputError, match=r"neither one shape.*give \(N, C, H, W\)"):
                summary(resnet18, size)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="too large to run"):
            summary(resnet18, (1, 3, 10**9, 10**9))


class Tied(nn.Module):
    """Two layers with one weight, and one operation that the IR does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.second = nn.Linear(12, 12, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.roll(self.second(self.first(x.flatten(1))), 1, 1)


class TestRules:
    def test_a_tied_weight_counts_once(self) -> None:
        found = summary(Tied().eval(), (2, 3, 2, 2))
        assert found.parameters == 12 * 12 + 12
        assert [layer.parameters for layer in found.layers] == [0, 156, 144, 0]
        assert found.macs == 2 * (2 * 12 * 12)
        assert found.uncounted == ("roll",)
        assert "multiply-adds not known: roll" in str(found)
