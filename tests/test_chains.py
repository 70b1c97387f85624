"""The baseline of fp32 counts both ways in which PyTorch adds up a convolution's products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastres
from fastres.references import InChains, in_chains
from fastres.tolerances import errors, worse


@pytest.fixture(scope="module", autouse=True)
def on_one_thread(one_thread: None) -> None:
    """For every test of this file."""


@pytest.fixture(scope="module")
def wide() -> nn.Module:
    """3x3 filters over 256 channels throughout, where the two sums differ most."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(32):
        conv = nn.Conv2d(256, 256, 3, padding=1, bias=False)
        nn.init.normal_(conv.weight, 0, (2 / 2304) ** 0.5)
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten()).eval()


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(n, 256, 6, 6, generator=random) for n in (2, 1)]


def in_channels_last(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), InChains():
        return model(x)  # type: ignore[no-any-return]


class Layouts(TorchDispatchMode):
    """Notes whether each convolution is fed channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.found.append(not args[0].is_contiguous())
        return func(*args, **(kwargs or {}))


def test_pytorchs_own_sums_pass_in_either_order(wide: nn.Module, images: list[Tensor]) -> None:
    report = fastres.verify(wide, lambda x: in_channels_last(wide, x), images)
    assert report.passed, str(report)


def test_twice_the_error_of_chains_fails(wide: nn.Module, images: list[Tensor]) -> None:
    def further(x: Tensor) -> Tensor:
        exact = wide.double()(x.double())
        wide.float()
        return (exact + 2.5 * (in_channels_last(wide, x).double() - exact)).float()

    with torch.no_grad():
        report = fastres.verify(wide, further, images)
    assert not report.passed


@pytest.mark.parametrize("layerwise", [False, True])
def test_an_engine_of_wide_filters(layerwise: bool, wide: nn.Module, images: list[Tensor]) -> None:
    with fastres.compile(wide, images[0], backend="cpu") as engine:
        report = fastres.verify(wide, engine, images, layerwise=layerwise, bisect=True)
    assert report.passed and report.bisection is None, str(report)


def test_only_contiguous_convolutions_of_pictures_change() -> None:
    with torch.no_grad(), Layouts() as seen, InChains():
        plain = nn.Conv2d(3, 4, 3)(torch.randn(2, 3, 8, 8))
        last = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)(torch.randn(2, 3, 8, 8))
        turned = nn.ConvTranspose2d(3, 4, 2)(torch.randn(2, 3, 8, 8))
        line = nn.Conv1d(3, 4, 3)(torch.randn(2, 3, 8))
    assert seen.found == [True, False, True, False]
    assert plain.is_contiguous() and turned.is_contiguous() and line.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_an_iterator_computes_each_value_so(wide: nn.Module, images: list[Tensor]) -> None:
    seen: list[Tensor] = []

    def values() -> Iterator[Tensor]:
        for x in images:
            yield wide[0](x)

    with torch.no_grad():
        for value in in_chains(values()):
            seen.append(value)
            seen.append(wide[0](images[0]))  # outside of it
        own = wide[0](images[0])
        chained = [in_channels_last(wide[0], x) for x in images]
    assert torch.equal(seen[0], chained[0]) and torch.equal(seen[2], chained[1])
    assert torch.equal(seen[1], own) and torch.equal(seen[3], own) and len(seen) == 4


def test_the_worse_of_two() -> None:
    oracle = torch.tensor([1.0, 2.0], dtype=torch.float64)
    near, far = torch.tensor([1.0, 2.1]), torch.tensor([1.2, 2.0])
    assert worse(near, far, oracle) is far and worse(far, near, oracle) is far
    assert worse(near, torch.tensor([1.0, torch.nan]), oracle) is near  # no number is no bound
    assert errors(far, oracle).rms > errors(near, oracle).rms
