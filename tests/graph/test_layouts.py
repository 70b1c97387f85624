"""Models in channels_last: captured as their contiguous twins are, unless the layout matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fastres.graph.export as exporting
from fastres import models
from fastres.errors import CaptureError
from fastres.graph.capture import capture
from fastres.options import Input

Agree = Callable[..., None]
ModelOf = Callable[..., nn.Module]
LAST = torch.channels_last
tv = torchvision.models


def conv(c: int, k: int, size: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, k, size, padding=size // 2, **options)


def asks(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return y * 2 if y.is_contiguous(memory_format=LAST) else y * 3


def strides(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) * (2.0 if m.conv(x).stride(1) == 1 else 3.0)


def memory(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)  # [N, 8, 6, 4], which lies as [N, 6, 4, 8]
    return y.as_strided((y.shape[0], 24, 8), (192, 8, 1)).softmax(-1)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that the exporter was shown."""
    seen: list[nn.Module] = []

    def counted(model: nn.Module, *rest: Any) -> Any:
        seen.append(model)
        return export(model, *rest)

    export = exporting._exported
    monkeypatch.setattr(exporting, "_exported", counted)
    return seen


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "bottlenecks": lambda: models.ResNet(models.Bottleneck, (1, 1, 1, 1), planes=8, seed=0),
    "basic blocks": lambda: models.cifar_resnet(8, seed=0),
    "grouped": lambda: models.ResNet(
        models.Bottleneck, (1, 1, 1, 1), planes=16, groups=4, width_per_group=16, seed=0
    ),
    "concatenated": lambda: tv.densenet.DenseNet(8, (2, 2), 16),
    "shuffled": lambda: tv.shufflenet_v2_x0_5(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_exported_once_to_the_same_graph(name: str, traced: list[nn.Module]) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    given = [Input((1, 3, 64, 64))]
    want = capture(model, given).graph
    model = model.to(memory_format=LAST)
    weights = dict(model.named_parameters())
    graph = capture(model, given).graph
    assert graph.equals(want) and str(graph) == str(want)
    assert len(traced) == 2
    for key, tensor in weights.items():  # shared, not copied, and as they were
        assert key not in graph.constants or graph.constants[key].data_ptr() == tensor.data_ptr()
        assert tensor.dim() != 4 or tensor.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("forward", [asks, strides, memory], ids=lambda f: f.__name__)
def test_where_the_layout_matters_it_is_the_models(
    forward: Callable[..., Any], model_of: ModelOf, agree: Agree
) -> None:
    shape = (1, 4, 6, 4)
    plain = model_of(forward, conv=conv(4, 8, 3))
    last = model_of(forward, conv=conv(4, 8, 3)).to(memory_format=LAST)
    x = torch.randn(2, *shape[1:])
    assert not torch.allclose(plain(x), last(x))
    for model in (plain, last):
        agree(model, capture(model, [Input(shape)]).graph, [x])


@pytest.mark.parametrize("shape", [(1, 4, 6, 4), (1, 1, 6, 4), (1, 4, 1, 1)], ids=str)
def test_what_the_model_asks_of_tensors_that_it_lays_out_itself(
    shape: tuple[int, ...], model_of: ModelOf, agree: Agree
) -> None:
    """PyTorch 2.11 answers it at random while it exports."""

    def forward(m: Any, x: Tensor) -> Tensor:
        last = x.contiguous(memory_format=LAST) * 2
        for y in (x, last, x.flatten(1), last[:, :, ::2], last.permute(0, 2, 3, 1)):
            x = x * (2 if y.is_contiguous(memory_format=LAST) else 3) + 1
            x = x * (2 if y.is_contiguous() else 3) + 1
        return x

    model = model_of(forward)
    agree(model, capture(model, [Input(shape)]).graph, [torch.randn(2, *shape[1:])])


def test_conditions_that_the_exporter_compiles(model_of: ModelOf) -> None:
    """What watches the model's forward is no part of them, which would not be exported."""

    def forward(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        return torch.cond(y.sum() > 0, lambda z: z * 2, lambda z: z * 3, (y,))

    for layout in (torch.contiguous_format, LAST):
        model = model_of(forward, conv=conv(4, 8, 3)).to(memory_format=layout)
        with pytest.raises(CaptureError, match="cond in the model itself .* decides by values"):
            capture(model, [Input((1, 4, 6, 4))])


def test_buffers_and_tied_weights(model_of: ModelOf, agree: Agree) -> None:
    """Buffers that no state_dict has, and one weight under two names."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.second(m.first(x)) * m.mask

    first, second = conv(4, 4, 3), conv(4, 4, 3)
    second.weight = first.weight
    model = model_of(forward, first=first, second=second)
    mask = torch.rand(1, 4, 6, 4).to(memory_format=LAST)
    model.register_buffer("mask", mask, persistent=False)
    model = model.to(memory_format=LAST)
    graph = capture(model, [Input((1, 4, 6, 4))]).graph
    assert torch.equal(graph.constants["mask"], mask)
    weights = {node.params["weight"] for node in graph if "weight" in node.params}
    assert len(weights) == 1 and weights <= {"first.weight", "second.weight"}
    agree(model, graph, [torch.randn(3, 4, 6, 4)])
