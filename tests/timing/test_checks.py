"""Parity before timing: what is right passes, and what is wrong is told how."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastres import models
from fastres.errors import ParityError
from fastres.timing.benchmark import Target
from fastres.timing.checks import Reference, check_target, judge, reference, rows_to_judge
from fastres.tolerances import Errors


@pytest.fixture(scope="module")
def x(photo_batch: Callable[[int, int], Tensor]) -> Tensor:
    return photo_batch(4, 32)


@pytest.fixture(scope="module")
def model(x: Tensor) -> nn.Module:
    return models.settle(models.cifar_resnet(8, seed=0), x)


def test_returns_the_error(model: nn.Module, x: Tensor) -> None:
    want = reference(model, x, "fp32")
    found = check_target(Target("eager", model), want, x, "fp32")
    assert (found.rms, found.largest) == (want.baseline.rms, want.baseline.largest)
    assert found.allowed_rms >= 2 * found.rms and not found.wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y * 1.001, "largest error .* allowed are"),
        (lambda y: y[:, :-1], r"shape \[4, 9\], expected \[4, 10\]"),
        (lambda y: y / 0, "NaN or infinite"),
        (lambda y: {"logits": y}, "returns dict"),
    ],
)
def test_red_parity(
    change: Callable[[Tensor], object], message: str, model: nn.Module, x: Tensor
) -> None:
    want = reference(model, x, "fp32")
    target = Target("wrong", lambda batch: change(model(batch)))
    with torch.no_grad(), pytest.raises(ParityError, match=f"wrong.*{message}"):
        check_target(target, want, x, "fp32")


def test_slack_is_over_the_own_error() -> None:
    exact = torch.ones(2, 3, dtype=torch.float64)
    want = Reference(exact, Errors(1e-2, 1e-2))
    assert not judge(exact + 0.015, want, "twice", "int8", 2).wrong
    assert judge(exact + 0.03, want, "three times", "int8", 2).wrong
    assert not judge(exact + 0.03, want, "three times", "int8", 2, slack=4.0).wrong


@pytest.mark.parametrize("size", [1, 7, 8, 9, 100, 256])
def test_rows_that_are_judged(size: int) -> None:
    rows = rows_to_judge(size)
    assert rows == sorted(set(rows)) and len(rows) == min(size, 8)
    assert rows[0] == 0 and rows[-1] == size - 1
