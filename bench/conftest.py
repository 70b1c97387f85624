"""What the benchmarks share: real photographs, settled networks, and their float64 results."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from bench.pictures import PHOTOS
from fastres import models
from fastres.calib.images import Preprocess, find_images
from fastres.options import Precision
from fastres.timing.checks import Reference, reference


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tiles-in", help="folder with tables of tiles that were measured")


@pytest.fixture(scope="session")
def photographs() -> Callable[[int], Tensor]:
    """photographs(n) -> [n, 3, 224, 224] fp32: the example photographs in turn, normalised."""
    pictures = Preprocess().batch(find_images(PHOTOS))
    return lambda n: pictures[torch.arange(n) % len(pictures)]


@pytest.fixture(scope="session")
def network(photographs: Callable[[int], Tensor]) -> Callable[[str], nn.Module]:
    """network(name) -> the reference network of that name, settled on the photographs."""

    @cache
    def make(name: str) -> nn.Module:
        return models.settle(getattr(models, name)(seed=0), photographs(3))

    return make


@pytest.fixture(scope="session")
def expected(
    network: Callable[[str], nn.Module], photographs: Callable[[int], Tensor]
) -> Callable[[str, int, Precision], Reference]:
    """expected(name, batch_size, precision) -> what a result is held against before timing."""

    @cache
    def make(name: str, batch_size: int, precision: Precision) -> Reference:
        return reference(network(name), photographs(batch_size), precision)

    return make
