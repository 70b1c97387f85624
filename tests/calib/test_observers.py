"""Observers: the same statistics whatever the batches, and those of the data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastres.calib.observers import BINS, COUNTED, Observer


def seen(*batches: Tensor) -> Observer:
    observer = Observer()
    for batch in batches:
        observer.add(batch)
    return observer


@pytest.fixture
def values() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(12, 5, 7, 6) * torch.logspace(-2, 2, 12).view(12, 1, 1, 1)


def test_histogram_is_that_of_all_values(values: Tensor) -> None:
    histogram = seen(values).histogram
    edges = np.arange(BINS + 1) * histogram.width
    wanted, _ = np.histogram(values.abs().double().numpy(), edges)
    assert histogram.counts.sum() == values.numel()
    assert np.abs(histogram.counts - wanted).sum() <= 2  # a value on an edge, in fp32
    assert histogram.largest == values.abs().max()
    assert BINS / 2 <= histogram.used <= BINS


@pytest.mark.parametrize("order", ["up", "down", "one by one"])
def test_batches_change_nothing(values: Tensor, order: str) -> None:
    whole = seen(values)
    size = 1 if order == "one by one" else 5
    parts = values.flip(0).split(size) if order == "down" else values.split(size)
    other = seen(*parts)  # upwards, the range doubles again and again
    assert np.array_equal(other.histogram.counts, whole.histogram.counts)
    assert other.histogram.width == whole.histogram.width
    assert other.largest == whole.largest
    torch.testing.assert_close(other.means, whole.means)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_means_are_by_channel(values: Tensor, layout: torch.memory_format) -> None:
    observer = seen(values[:4].to(memory_format=layout), values[4:])
    torch.testing.assert_close(observer.means, values.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    rows = values[:, :, 0, 0]
    torch.testing.assert_close(seen(rows).means, rows.mean(0))


@pytest.mark.parametrize("largest", [1.0, 2.0, 0.5, 3.999, 1e-30, 1e29])
def test_the_largest_value_is_inside(largest: float) -> None:
    observer = seen(torch.tensor([[0.0, largest, -largest / 3]]))
    assert observer.histogram.counts.sum() == 3
    assert observer.histogram.width * BINS > largest


def test_zeros_count_before_and_after() -> None:
    observer = seen(torch.zeros(2, 3), torch.ones(1, 3), torch.zeros(4, 3))
    assert observer.histogram.counts[0] == 18
    assert observer.histogram.counts.sum() == 21
    nothing = seen(torch.zeros(2, 3)).histogram
    assert (nothing.largest, nothing.quantile(0.99)) == (0.0, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused(values: Tensor, bad: float) -> None:
    values[3, 2, 1, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        seen(values)


def test_nothing_seen_has_no_means() -> None:
    with pytest.raises(ValueError, match="nothing was observed"):
        _ = Observer().means


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_of_large_maps_pixels_are_counted_evenly(layout: torch.memory_format) -> None:
    """With the largest and the means of all; and the same whatever shares the batch."""
    torch.manual_seed(0)
    images = torch.randn(3, 64, 112, 112)
    images[1, 5, 60, 61], images[2, :, :, 56:] = -9.0, 3.5
    images = images.to(memory_format=layout)
    one_by_one = seen(*images.split(1))
    together = seen(images)
    assert np.array_equal(one_by_one.histogram.counts, together.histogram.counts)
    assert together.largest == 9.0
    torch.testing.assert_close(together.means, images.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    counted = int(together.histogram.counts.sum())
    assert 3 * COUNTED <= counted < images.numel() / 8
    share = together.histogram.counts[int(3.5 / together.histogram.width)] / counted
    assert share == pytest.approx(1 / 6, rel=0.02)  # half of one image of three: all columns
    exact = float(torch.quantile(images[0].abs().flatten()[: 1 << 23], 0.999))
    assert seen(images[:1]).histogram.quantile(0.999) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("size", [(512, 7, 7), (16, 32, 32), (128, 32, 32)])
def test_of_small_maps_all_values_are_counted(size: tuple[int, int, int]) -> None:
    assert seen(torch.rand(2, *size)).histogram.counts.sum() == 2 * np.prod(size)
