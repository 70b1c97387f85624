"""Outputs of few numbers: the error of PyTorch's one run may be small by luck, and binds nobody."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastres
import fastres.parity
from fastres.tolerances import FLOOR, RMS_FLOOR


@pytest.fixture(scope="module", autouse=True)
def on_one_thread(one_thread: None) -> None:
    """For every test of this file."""


class Deep(nn.Module):
    """One number for each image, as a regression or a binary classifier gives."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for i in range(12):
            conv = nn.Conv2d(48 if i else 3, 48, 3, padding=1)
            nn.init.normal_(conv.weight, 0, (2 / (9 * conv.in_channels)) ** 0.5)
            layers += [conv, nn.ReLU()]
        self.layers, self.fc = nn.Sequential(*layers), nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean((2, 3)))  # type: ignore[no-any-return]


@torch.no_grad()
def passes(seed: int, error: float | None = None) -> bool:
    """Whether a candidate passes whose error is so many of PyTorch's usual ones, or a draw."""
    model, exact = Deep(seed).eval(), Deep(seed).eval().double()
    random = torch.Generator().manual_seed(seed)
    many = torch.randn(64, 3, 8, 8, generator=random)
    usual = (model(many) - exact(many.double())).square().mean().sqrt()
    drawn = usual * (float(torch.randn((), generator=random)) if error is None else error)
    return fastres.verify(model, lambda x: (exact(x.double()) + drawn).float(), [many[:1]]).passed


@pytest.fixture
def without_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the errors of small networks, which are below them, decide."""
    monkeypatch.setitem(FLOOR, torch.float32, 0.0)
    monkeypatch.setitem(RMS_FLOOR, torch.float32, 0.0)


def test_a_lucky_draw_is_no_bound(without_floors: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(passes(seed) for seed in range(20))
    monkeypatch.setattr(fastres.parity, "FEW", 0)
    assert not all(passes(seed) for seed in range(20))  # else nothing was shown


def test_a_large_error_is_past_every_draw(without_floors: None) -> None:
    assert not any(passes(seed, error=50.0) for seed in range(10))


def test_many_numbers_are_held_to_the_one_run(
    without_floors: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.Conv2d(3, 8, 3).eval(), torch.randn(2, 3, 8, 8)
    runs = []
    run = fastres.parity.ModelReference.run

    def counted(self: object, inputs: object, dtype: torch.dtype) -> object:
        runs.append(dtype)
        return run(self, inputs, dtype)  # type: ignore[arg-type]

    monkeypatch.setattr(fastres.parity.ModelReference, "run", counted)
    assert not fastres.verify(model, lambda x: model(x) + 1e-4, [x]).passed
    assert runs == [torch.float64, torch.float32, torch.float32]  # the last for the other sums
