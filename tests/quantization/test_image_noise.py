"""SQNR image by image: the median is that of the many, whatever one image does."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.calib.thresholds import ALGORITHMS
from fastres.quantization.image_noise import Exact

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(found: Tensor, exact: Tensor) -> list[float]:
    """In dB, of each image, in NumPy."""
    f, e = (t.double().reshape(len(t), -1).numpy() for t in (found, exact))
    centre = np.median(e, 0)
    signal, noise = ((e - centre) ** 2).sum(1), ((f - e) ** 2).sum(1)
    return [10 * math.log10(s / n) for s, n in zip(signal, noise, strict=True)]


@pytest.mark.parametrize("shape", [(9, 5), (8, 5), (7, 3, 4, 4)])
def test_it_is_the_median_over_images(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    exact = torch.randn(shape)
    found = exact + torch.randn(shape) * torch.rand(len(exact)).view(-1, *[1] * (len(shape) - 1))
    wanted = statistics.median_low(by_hand(found, exact))
    for parts in ([len(exact)], [3, len(exact) - 3]):
        one = Exact([[y] for y in exact.split(parts)], parts)
        assert one.median_sqnr([[y] for y in found.split(parts)]) == pytest.approx(wanted)


def test_one_odd_image_moves_nothing_far() -> None:
    torch.manual_seed(0)
    exact = torch.randn(16, 10)
    found = exact + 0.01 * torch.randn(16, 10)
    calm = Exact([[exact]], [16]).median_sqnr([[found]])
    for odd, noise in ((1e4, 3e3), (1e4, 0.0), (0.0, 1e3)):
        exact[5], found[5] = odd, odd + noise
        assert Exact([[exact]], [16]).median_sqnr([[found]]) == pytest.approx(calm, abs=2.5)


def test_of_several_outputs_an_image_s_worst_counts() -> None:
    torch.manual_seed(0)
    exact = [torch.randn(6, 4), torch.randn(6, 2, 3, 3)]
    found = [y + 0.1 * torch.randn(y.shape) for y in exact]
    worst = [min(pair) for pair in zip(*map(by_hand, found, exact), strict=True)]
    got = Exact([exact], [6]).median_sqnr([found])
    assert got == pytest.approx(statistics.median_low(worst))


def test_sizes_may_differ_between_batches() -> None:
    torch.manual_seed(0)
    small, large = torch.randn(3, 2, 4, 4), torch.randn(5, 2, 6, 6)
    found = [[y + 0.1 * torch.randn(y.shape)] for y in (small, large)]
    wanted = by_hand(found[0][0], small) + by_hand(found[1][0], large)
    got = Exact([[small], [large]], [3, 5]).median_sqnr(found)
    assert got == pytest.approx(statistics.median_low(wanted))


def test_where_images_do_not_differ_the_whole_is_the_signal() -> None:
    for images in (1, 3):
        same = torch.ones(images, 4)
        assert Exact([[same]], [images]).median_sqnr([[same + 0.1]]) == pytest.approx(20, abs=1e-4)
        assert Exact([[same]], [images]).median_sqnr([[same]]) == math.inf
    assert Exact([[0 * same]], [3]).median_sqnr([[same]]) == -math.inf


def test_infinities_in_both_alike_are_equal() -> None:
    exact = torch.tensor([[0.0, 1.0, -math.inf], [2.0, 1.0, -math.inf], [4.0, 5.0, -math.inf]])
    finite = exact[:, :2]
    wanted = Exact([[finite]], [3]).median_sqnr([[finite + 0.1]])
    assert Exact([[exact]], [3]).median_sqnr([[exact + 0.1]]) == pytest.approx(wanted, abs=1e-4)
    lost = exact.nan_to_num(neginf=-1.0)
    assert Exact([[exact]], [3]).median_sqnr([[lost]]) == -math.inf


def test_what_has_no_batch_is_every_image_s() -> None:
    total = torch.tensor([3.0, 4.0])
    assert Exact([[total]], [5]).median_sqnr([[total + 0.5]]) == pytest.approx(
        10 * math.log10(25 / 0.5)
    )


class Two(nn.Module):
    """A classifier that returns a map as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.b(self.a(x).relu())
        return self.fc(y.relu().mean((2, 3))), y


@pytest.mark.parametrize("odd", [1.0, 100.0])
@pytest.mark.parametrize("batch", [24, 5])
def test_auto_takes_what_is_best_for_the_median_image(odd: float, batch: int) -> None:
    """One image a hundred times as large as the others decides by itself if all are summed up."""
    torch.manual_seed(0)
    model = Two().eval()
    data = torch.randn(24, 3, 12, 12)
    data[7] *= odd
    table = fastres.quantize(model, data.split(batch))
    with torch.no_grad():
        exact = model(data)
    scores = {}
    for name in ALGORITHMS:
        with fastres.compile(
            model, data[:1], calibration=table.using(name), backend="reference"
        ) as engine:
            each = [by_hand(found, want) for found, want in zip(engine(data), exact, strict=True)]
        scores[name] = statistics.median_low([min(pair) for pair in zip(*each, strict=True)])
    assert scores[table.algorithm] > max(scores.values()) - 0.05
    assert len(set(map(round, scores.values()))) > 1
    if odd > 1:
        assert "image 7 (" in table.notes[0] and "far from the rest" in table.notes[0]
    else:
        assert table.notes == ()
