"""fastres.graph.builder: weights alone give the graph that capture reads off the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fastres import models
from fastres.errors import BuildError
from fastres.graph.builder import ResNetSpec, build_graph
from fastres.graph.capture import capture
from fastres.graph.ir import Add, Graph
from fastres.models.settling import settle
from fastres.options import Input

Hollow = Callable[..., nn.Module]
PhotoBatch = Callable[[int, int], Tensor]
PICTURE = Input((1, 3, 64, 64))
RANGED = Input(((1, 3, 32, 32), (1, 3, 64, 64), (8, 3, 224, 224)))
TINY = Input((1, 3, 32, 32))


@dataclass(frozen=True)
class Case:
    """A network, how it is made and fed, and what its weights do not show."""

    factory: Callable[..., nn.Module]
    options: dict[str, Any]
    spec: ResNetSpec
    image: Input
    blocks: int
    projections: int
    convs: int  # of one block
    slow: bool = False


DEPTHS = {
    "resnet18": (8, 3, 2),
    "resnet34": (16, 3, 2),
    "resnet50": (16, 4, 3),
    "resnet101": (33, 4, 3),
    "resnet152": (50, 4, 3),
    "resnext50_32x4d": (16, 4, 3),
    "resnext101_32x8d": (33, 4, 3),
    "wide_resnet50_2": (16, 4, 3),
    "wide_resnet101_2": (33, 4, 3),
}


def case(name: str, library: Any, image: Input = PICTURE, **options: Any) -> Case:
    blocks, projections, convs = DEPTHS[name]
    shortcut, version = options.get("shortcut", "B"), options.get("version", "v1.5")
    projections = {"A": 0, "B": projections, "C": blocks}[shortcut]
    dilate = tuple(map(bool, options.get("replace_stride_with_dilation", (0, 0, 0))))
    spec = ResNetSpec(version if convs == 3 else None, dilate=dilate)
    return Case(getattr(library, name), options, spec, image, blocks, projections, convs)


def cifar(depth: int, **options: Any) -> Case:
    blocks = (depth - 2) // 2
    projections = {"A": 0, "B": 2, "C": blocks}[options.get("shortcut", "A")]
    options = {"depth": depth, **options}
    slow = depth > 1000
    factory = models.cifar_resnet
    return Case(factory, options, ResNetSpec(), TINY, blocks, projections, 2, slow)


tv = torchvision.models
CASES: dict[str, Case] = {
    **{name: case(name, models) for name in DEPTHS},
    **{f"torchvision {name}": case(name, tv) for name in DEPTHS},
    "resnet18 A": case("resnet18", models, RANGED, shortcut="A"),
    "resnet18 C": case("resnet18", models, shortcut="C"),
    "resnet50 v1": case("resnet50", models, RANGED, version="v1"),
    "resnet50 v1 A": case("resnet50", models, RANGED, version="v1", shortcut="A"),
    "resnet50 v1 C": case("resnet50", models, version="v1", shortcut="C"),
    "resnet18 for small pictures": case("resnet18", models, TINY, stem="cifar", num_classes=10),
    "resnet50 for small pictures": case("resnet50", models, TINY, stem="cifar", shortcut="C"),
    "resnet50 v1 dilated": case(
        "resnet50", models, version="v1", replace_stride_with_dilation=(False, True, True)
    ),
    "torchvision dilated by 2": case(
        "resnet50", tv, RANGED, replace_stride_with_dilation=[False, False, True]
    ),
    "torchvision dilated by 4": case(
        "resnet50", tv, replace_stride_with_dilation=[False, True, True]
    ),
    "torchvision dilated by 8": case(
        "resnext50_32x4d", tv, replace_stride_with_dilation=[True, True, True]
    ),
    **{f"cifar {depth}": cifar(depth) for depth in (20, 32, 44, 56, 110, 1202)},
    "cifar 20 B": cifar(20, shortcut="B"),
    "cifar 20 C": cifar(20, shortcut="C"),
}
PARAMS = [
    pytest.param(case, id=name, marks=pytest.mark.slow if case.slow else ())
    for name, case in CASES.items()
]


@pytest.mark.parametrize("case", PARAMS)
def test_equals_capture(case: Case, hollow: Hollow) -> None:
    model = hollow(case.factory, **case.options)
    captured = capture(model, [case.image]).graph
    built = build_graph(model.state_dict(), case.spec, case.image)
    assert str(built) == str(captured)
    assert built.equals(captured)
    counted = Counter(type(node.op).__name__ for node in captured)
    convs = 1 + case.blocks * case.convs + case.projections
    assert counted["Conv2d"] == counted["BatchNorm"] == convs
    assert counted["Add"] == case.blocks
    assert counted["Activation"] == 1 + case.blocks * case.convs
    assert counted["Aten"] == 0


def head() -> nn.Module:
    model = models.cifar_resnet(8, seed=0)
    model.fc = nn.Sequential(  # type: ignore[assignment]
        nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 5)
    )
    return model.eval()


class TestHeads:
    def test_several_linears_must_be_said(self) -> None:
        with pytest.raises(BuildError, match=r"fc.0, fc.3.*ResNetSpec\(head=\('fc.0', 'relu'"):
            build_graph(head().state_dict(), ResNetSpec())

    def test_said(self) -> None:
        model, spec = head(), ResNetSpec(head=("fc.0", "relu", "fc.3"))
        assert build_graph(model.state_dict(), spec).equals(capture(model, [TINY]).graph)

    @pytest.mark.parametrize("kind", ["silu", "sigmoid", "gelu", "hardswish"])
    def test_other_activations(self, kind: str) -> None:
        graph = build_graph(head().state_dict(), ResNetSpec(head=("fc.0", kind, "fc.3")))
        assert graph["fc.1"].op.kind == kind

    def test_one_linear_of_a_sequence(self) -> None:
        model = models.cifar_resnet(8, seed=0).eval()
        model.fc = nn.Sequential(nn.Dropout(), nn.Linear(64, 5)).eval()  # type: ignore[assignment]
        built = build_graph(model.state_dict(), ResNetSpec())
        assert built.equals(capture(model, [TINY]).graph)

    def test_none(self) -> None:
        model = models.cifar_resnet(8, seed=0).eval()
        model.fc = nn.Identity().eval()  # type: ignore[assignment]
        built = build_graph(model.state_dict(), ResNetSpec())
        assert built.outputs == ("flatten",)
        assert built.equals(capture(model, [TINY]).graph)

    def test_another_name(self) -> None:
        weights = weights_of()
        weights |= {f"classifier.{k}": weights.pop(f"fc.{k}") for k in ("weight", "bias")}
        with pytest.raises(BuildError, match="classifier.bias, classifier.weight"):
            build_graph(weights, ResNetSpec())
        graph = build_graph(weights, ResNetSpec(head=("classifier",)))
        assert graph.outputs == ("classifier",)

    def test_of_something_else(self) -> None:
        with pytest.raises(BuildError, match=r"conv1 in head=\('conv1',\) is no Linear"):
            build_graph(weights_of(), ResNetSpec(head=("conv1",)))
        with pytest.raises(BuildError, match="the weight tail.weight is missing"):
            build_graph(weights_of(), ResNetSpec(head=("fc", "tail")))


class TestSpec:
    def test_keras_epsilon(self) -> None:
        graph = build_graph(weights_of(), ResNetSpec(bn_eps=1.001e-5))
        assert {n.op.eps for n in graph if type(n.op).__name__ == "BatchNorm"} == {1.001e-5}

    def test_biases_of_convolutions(self) -> None:
        model = models.cifar_resnet(8, seed=0)
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Conv2d):
                    args = (child.in_channels, child.out_channels, 3, child.stride, 1)
                    setattr(module, name, nn.Conv2d(*args))
        built = build_graph(model.state_dict(), ResNetSpec())
        assert built.equals(capture(model.eval(), [TINY]).graph)

    def test_the_stem_may_be_said(self) -> None:
        graph = build_graph(weights_of(), ResNetSpec(stem="imagenet"))
        assert graph["conv1"].op.stride == (2, 2) and "maxpool" in graph

    def test_the_picture(self) -> None:
        graph = build_graph(weights_of(), ResNetSpec(), RANGED)
        assert str(graph.inputs[0].spec) == "f32[N, 3, H, W]"
        assert str(build_graph(weights_of(), ResNetSpec()).inputs[0].spec) == "f32[N, 3, 32, 32]"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        model = models.cifar_resnet(8, seed=0).eval().to(dtype)
        built = build_graph(model.state_dict(), ResNetSpec())
        assert built.inputs[0].spec.torch_dtype == dtype
        assert built.equals(capture(model, [TINY]).graph)

    def test_versions_differ_though_their_weights_do_not(
        self, agree: Callable[..., None], photo_batch: PhotoBatch
    ) -> None:
        x = photo_batch(3, 64)
        model = settle(narrow("v1"), x)
        weights = model.state_dict()
        agree(model, build_graph(weights, ResNetSpec("v1"), PICTURE), [x])
        with pytest.raises(AssertionError):
            agree(model, build_graph(weights, ResNetSpec("v1.5"), PICTURE), [x])


def narrow(version: models.Version = "v1.5") -> nn.Module:
    return models.ResNet(
        models.Bottleneck, (1, 1, 1, 1), planes=8, num_classes=5, version=version, seed=0
    )


def weights_of(model: nn.Module | None = None) -> dict[str, Tensor]:
    return dict((model or models.cifar_resnet(8, shortcut="B", seed=0)).state_dict())


def test_too_small_a_picture() -> None:
    model = torchvision.models.resnet18()
    spec, image = ResNetSpec(), Input((1, 3, 1, 1))
    assert isinstance(build_graph(model.state_dict(), spec, image), Graph)  # padding suffices


def test_the_shortcut_takes_the_second_place() -> None:
    """Capture sees `out + identity`: the order is the model's."""
    graph = build_graph(weights_of(), ResNetSpec())
    adds = [node.inputs for node in graph if isinstance(node.op, Add)]
    assert adds[0] == ("layer1.0.bn2", "relu")
    assert adds[1] == ("layer2.0.bn2", "layer2.0.downsample.1")
