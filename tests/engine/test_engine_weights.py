"""The engine's weights: updating them, and that they are its own."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

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


@pytest.fixture(scope="module")
def other(photo_batch: PhotoBatch) -> nn.Module:
    """Trained on from other weights."""
    return fastres.models.settle(fastres.models.cifar_resnet(20, seed=1), photo_batch(32, 32))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m.state_dict(),
        lambda m: nn.DataParallel(m).state_dict(),
        lambda m: torch.compile(nn.DataParallel(m), backend="eager").state_dict(),
        lambda m: {"epoch": 3, "model_state_dict": m.state_dict(), "optimizer_state_dict": {}},
        lambda m: {"model_ema": AveragedModel(m).state_dict(), "args": Namespace(lr=0.1)},
        lambda m: {"state_dict": {f"net.{name}": t for name, t in m.state_dict().items()}},
    ],
    ids=["bare", "module.", "_orig_mod.module.", "tutorial", "averaged", "Lightning"],
)
@pytest.mark.parametrize("suffix", [None, ".pth.tar", ".ckpt"])
def test_update_weights_as_training_leaves_them(
    model: nn.Module,
    other: nn.Module,
    photo_batch: PhotoBatch,
    wrap: Callable[[nn.Module], Any],
    suffix: str | None,
    tmp_path: Path,
) -> None:
    x, given = photo_batch(2, 32), wrap(other)
    if suffix:
        torch.save(given, tmp_path / f"net{suffix}")
        given = tmp_path / f"net{suffix}"
    with fastres.compile(model, x, backend="reference") as engine:
        engine.update_weights(given)
        assert close(engine(x), other, x) and not close(engine(x), model, x)


def test_update_weights_asks_which(
    model: nn.Module, other: nn.Module, photo_batch: PhotoBatch, tmp_path: Path
) -> None:
    x = photo_batch(2, 32)
    content = {"state_dict": model.state_dict(), "state_dict_ema": other.state_dict()}
    torch.save(content, tmp_path / "net.pth")
    with fastres.compile(model, x, backend="reference") as engine:
        before = engine(x)
        for given in (content, tmp_path / "net.pth", str(tmp_path / "net.pth")):
            with pytest.raises(InputError, match=r"entry='state_dict_ema'; nothing was changed"):
                engine.update_weights(given)
            assert torch.equal(engine(x), before)
            engine.update_weights(given, entry="state_dict_ema")
            assert close(engine(x), other, x)
            engine.update_weights(given, entry="state_dict")
            assert torch.equal(engine(x), before)


def test_update_weights_refuses_other_files(
    model: nn.Module, photo_batch: PhotoBatch, tmp_path: Path
) -> None:
    x = photo_batch(1, 32)
    torch.save(model, tmp_path / "whole.pth")
    torch.save({"module.fc.bias": torch.zeros(10)}, tmp_path / "part.pth")
    torch.save(nn.DataParallel(model).state_dict() | {"module.x": x}, tmp_path / "more.pth")
    with fastres.compile(model, x, backend="reference") as engine:
        before = engine(x)
        for name, said in (
            ("none.pth", "there is no file"),
            ("whole.pth", r"made anew with torch.save\(model.state_dict\(\)\)"),
            ("part.pth", "is missing"),
            ("more.pth", "1 weights are not the model's: x"),
        ):
            with pytest.raises(InputError, match=f"{said}.*; nothing was changed"):
                engine.update_weights(tmp_path / name)
        assert torch.equal(engine(x), before)


@pytest.mark.parametrize("name", ["model", "backbone", "module"])
def test_update_weights_where_the_models_own_names_have_prefixes(
    model: nn.Module, other: nn.Module, photo_batch: PhotoBatch, name: str
) -> None:
    x = photo_batch(2, 32)
    whole, new = (
        nn.Sequential(OrderedDict([(name, m), ("f", nn.Flatten())])) for m in (model, other)
    )
    with fastres.compile(whole.eval(), x, backend="reference") as engine:
        for given in (new.state_dict(), nn.DataParallel(new).state_dict()):
            engine.update_weights(whole.state_dict())
            engine.update_weights(given)
            assert close(engine(x), other, x)
