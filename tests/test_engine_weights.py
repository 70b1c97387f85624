"""The engine's weights: updating them, and that they are its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.errors import InputError

PhotoBatch = Callable[[int, int], Tensor]


@pytest.fixture(scope="module")
def model(photo_batch: PhotoBatch) -> nn.Module:
    return fastres.models.settle(fastres.models.cifar_resnet(20, seed=0), photo_batch(32, 32))


def close(y: Tensor, model: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(y, model(x), rtol=1e-4, atol=1e-4)


def test_update_weights(model: nn.Module, photo_batch: PhotoBatch) -> None:
    x = photo_batch(3, 32)
    other = fastres.models.settle(fastres.models.cifar_resnet(20, seed=1), photo_batch(32, 32))
    with fastres.compile(model, x, backend="cpu") as engine:
        before = engine(x)
        engine.update_weights(other.state_dict())
        assert close(engine(x), other, x)
        engine.update_weights(model.state_dict())
        assert torch.equal(engine(x), before)


def _without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != "bn1.weight"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without, "bn1.weight is missing; nothing was changed"),
        (lambda s: s | {"extra": torch.zeros(1)}, "1 weights are not the model's: extra"),
        (lambda s: s | {"fc.bias": torch.zeros(9)}, r"fc.bias is f32\[9\], expected f32\[10\]"),
        (lambda s: s | {"fc.bias": torch.zeros(10).half()}, r"fc.bias is f16\[10\]"),
        (lambda s: s | {"fc.bias": torch.full((10,), float("nan"))}, "fc.bias holds NaN"),
        (lambda s: s | {"fc.bias": 3}, "fc.bias is int"),
        (lambda s: s | {5: torch.zeros(1)}, "1 weights are not the model's: 5"),
        (lambda s: s | {"fc.bias": torch.zeros(10, device="meta")}, "a tensor on the meta device"),
        (lambda s: s | {"fc.bias": torch.zeros(10).to_sparse()}, "a tensor of torch.sparse_coo"),
        (lambda s: s | {"fc.bias": torch.zeros(10).cfloat()}, "a tensor of torch.complex64"),
        (lambda s: s | {"fc.bias": torch.zeros(10).short()}, "a tensor of torch.int16"),
    ],
)
def test_update_weights_refuses_what_does_not_fit(
    model: nn.Module,
    photo_batch: PhotoBatch,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    says: str,
) -> None:
    x = photo_batch(1, 32)
    with fastres.compile(model, x, backend="cpu") as engine:
        before = engine(x)
        with pytest.raises(InputError, match=says):
            engine.update_weights(change(dict(model.state_dict())))
        with pytest.raises(InputError, match="state_dict is NoneType"):
            engine.update_weights(None)
        assert torch.equal(engine(x), before)


def test_engine_keeps_its_weights_when_the_model_trains_on(photo_batch: PhotoBatch) -> None:
    x = photo_batch(1, 32)
    model = fastres.models.settle(fastres.models.cifar_resnet(20), photo_batch(8, 32))
    with fastres.compile(model, x, backend="cpu") as engine:
        before = engine(x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(engine(x), before)
        assert all(t.abs().sum() > 0 for t in engine.graph.constants.values())
