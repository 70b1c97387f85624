"""Whole networks through capture and the passes: settled on photographs, in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

from fastres import models
from fastres.graph.builder import ResNetSpec, build_graph
from fastres.graph.capture import capture
from fastres.graph.ir import Aten
from fastres.graph.passes.pipeline import optimise
from fastres.models.settling import settle
from fastres.options import Input

Agree = Callable[..., None]
PhotoBatch = Callable[[int, int], Tensor]
tv = torchvision.models


def seeded(factory: Callable[..., nn.Module], *args: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return factory(*args, **options)


def narrow(**options: Any) -> nn.Module:
    return models.ResNet(
        models.Bottleneck, (1, 2, 1, 1), planes=16, num_classes=7, seed=0, **options
    )


def with_head() -> nn.Module:
    model = seeded(tv.resnet18)
    model.fc = nn.Sequential(  # as transfer learning leaves it
        nn.Linear(512, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 5)
    )
    return model


def backbone() -> nn.Module:
    """The maps that a detector takes, by name."""
    return create_feature_extractor(
        seeded(tv.resnet18), {"layer2": "C3", "layer3": "C4", "layer4": "C5"}
    )


class TwoTasks(nn.Module):
    """One trunk, two heads, and a residual block's in-place ReLU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = narrow()
        self.trunk.fc = nn.Identity()  # type: ignore[assignment]
        self.kind, self.box = nn.Linear(512, 3), nn.Linear(512, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.trunk(x)
        scores = self.kind(features)
        return scores.softmax(-1), {"scores": scores, "boxes": self.box(features).relu_()}


class Squeezed(nn.Module):
    """Squeeze and excitation, as most write it: sizes of the batch in a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.excite = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        b, c, _, _ = y.size()
        gate = self.excite(nn.functional.adaptive_avg_pool2d(y, 1).view(b, c)).view(b, c, 1, 1)
        return torch.relu_(y * gate.expand_as(y))


def frozen(model: nn.Module) -> nn.Module:
    """A detector's norms, whose every term matters."""
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5)):
                tensor.uniform_(low, low + 1)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision resnet18": lambda: seeded(tv.resnet18),
    "torchvision resnet50 dilated": lambda: seeded(
        tv.resnet50, replace_stride_with_dilation=[False, True, True]
    ),
    "v1, shortcut C": lambda: narrow(version="v1", shortcut="C"),
    "v1.5, shortcut A": lambda: narrow(shortcut="A"),
    "grouped": lambda: narrow(groups=4, width_per_group=16),
    "wide": lambda: narrow(width_per_group=128),
    "small pictures": lambda: narrow(stem="cifar"),
    "cifar 20": lambda: models.cifar_resnet(20, seed=0),
    "cifar 110": lambda: models.cifar_resnet(110, seed=0),
    "pre-activation 20": lambda: models.preact_resnet(20, seed=0),
    "pre-activation, shortcut A": lambda: models.preact_resnet(8, shortcut="A", seed=0),
    "a head of two layers": with_head,
    "a backbone": backbone,
    "two tasks": TwoTasks,
    "frozen norms": lambda: frozen(seeded(tv.resnet18, norm_layer=FrozenBatchNorm2d)),
    "squeeze and excitation": Squeezed,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_keeps_its_meaning(name: str, agree: Agree, photo_batch: PhotoBatch) -> None:
    model = settle(NETWORKS[name](), photo_batch(4, 40)).double()  # folding rounds to the dtype
    graph = capture(model, [Input(((1, 3, 32, 32), (1, 3, 40, 40), (8, 3, 64, 64)))]).graph
    folded = optimise(graph)
    kept = [node.op.overload for node in folded if isinstance(node.op, Aten)]
    assert not kept or name == "squeeze and excitation"
    assert len(folded.nodes) < len(graph.nodes)
    for x in (photo_batch(1, 40), photo_batch(3, 61)[..., :33]):
        agree(model, graph, [x])
        agree(model, folded, [x])


def test_pre_activation_has_norms_that_stay() -> None:
    graph = capture(models.preact_resnet(20, seed=0).eval(), [Input((1, 3, 32, 32))]).graph
    counted = Counter(type(node.op).__name__ for node in graph)
    assert counted["Conv2d"] == 1 + 9 * 2 + 2
    assert counted["BatchNorm"] == 9 * 2 + 1
    assert counted["Add"] == 9
    after = Counter(type(node.op).__name__ for node in optimise(graph))
    # the first norm of each block follows a sum: only the second ones fold
    assert after["BatchNorm"] == 9 + 1
    assert after["Add"] == 0 and after["Activation"] == 0


def test_a_backbone_returns_its_tree(photo_batch: PhotoBatch) -> None:
    graph = capture(backbone().eval(), [Input((1, 3, 64, 64))]).graph
    assert graph.outputs == ("layer2.1.relu_1", "layer3.1.relu_1", "layer4.1.relu_1")
    assert [str(graph.spec(n)) for n in graph.outputs] == [
        "f32[N, 128, 8, 8]",
        "f32[N, 256, 4, 4]",
        "f32[N, 512, 2, 2]",
    ]


def test_two_roads_one_meaning(agree: Agree, photo_batch: PhotoBatch) -> None:
    x = photo_batch(4, 64)
    model = settle(seeded(tv.resnet18), x)
    built = build_graph(model.state_dict(), ResNetSpec(), Input((1, 3, 64, 64)))
    agree(model, built, [x])
