"""What calibration keeps of a tensor: largest magnitude, histogram of magnitudes, channel means.

All of it streams: but for one number an image, an observer's memory does not grow with the data,
and as its histogram's range is a power of two that doubles when it must, the order and size of
batches change nothing in it. The largest magnitudes and the means are of all values; the histogram
is of all channels at some pixels, which lie evenly over each map: neighbours say much the same, and
counting is what takes long.
"""

from __future__ import annotations

import math
from array import array

import numpy as np
import torch

from fastres.calib.thresholds import Histogram

BINS = 4096  # of which at least half are used, as the range is less than twice the largest value
COUNTED = 1 << 16  # values of a map that the histogram takes at least, if it has so many
_LARGEST = 1e30  # sums of as many as there are do not overflow fp32


class Observer:
    """Statistics of one tensor over all batches seen."""

    def __init__(self) -> None:
        self.values = 0
        self.zeros = 0
        self.largest = 0.0
        self._limit = 0.0  # the histogram's range; 0 before anything but zeros was seen
        self._counts = np.zeros(BINS, np.int64)
        self._sums: torch.Tensor | None = None
        self._each = array("f")

    def add(self, x: torch.Tensor) -> None:
        """Takes in one batch.

        Args:
            x: floating point, [N, C], [N, C, H, W] or [N, ..., C], not empty.

        Raises:
            ValueError: it holds NaN or infinities, or values beyond 1e30.
        """
        maps = x.permute(0, 2, 3, 1).flatten(1, 2) if x.ndim == 4 else x
        pixels = maps.reshape(len(x), -1, maps.shape[-1])
        images = pixels.flatten(1)  # as they lie in memory
        lows, highs = images.amin(1), images.amax(1)
        low, high = float(lows.min()), float(highs.max())
        if not math.isfinite(low) or not math.isfinite(high):
            raise ValueError("it holds NaN or infinite values")
        largest = max(-low, high)
        if largest > _LARGEST:
            raise ValueError(f"it holds values of {largest:.1e}, far out of any sensible range")
        self._each.extend(torch.maximum(-lows, highs).tolist())
        sums = pixels.sum((0, 1), dtype=torch.float32).double()
        self._sums = sums if self._sums is None else self._sums + sums
        self.values += x.numel()
        counted = pixels[:, :: _step(*x.shape[1:]) if x.ndim == 4 else 1]
        if largest == 0:
            self.zeros += counted.numel()
            return
        self.largest = max(self.largest, largest)
        self._widen(largest)
        magnitudes = counted.float() if low >= 0 else counted.float().abs()
        counts = torch.histc(magnitudes, BINS, 0, self._limit)
        self._counts += counts.numpy(force=True).astype(np.int64)

    def _widen(self, largest: float) -> None:
        """Doubles the range until `largest` is inside."""
        limit = 2.0 ** math.floor(math.log2(largest) + 1)
        if self._limit == 0:
            self._limit = limit
        while self._limit < limit:
            pairs = self._counts.reshape(-1, 2).sum(1)
            self._counts = np.concatenate([pairs, np.zeros_like(pairs)])
            self._limit *= 2

    @property
    def histogram(self) -> Histogram:
        """Of the magnitudes counted; those of batches that were all zero are in the first bin."""
        counts = self._counts.copy()
        counts[0] += self.zeros
        return Histogram(counts, self._limit / BINS, self.largest)

    @property
    def largest_of_each(self) -> torch.Tensor:
        """Each image's largest magnitude: fp32 [images]."""
        return torch.tensor(self._each, dtype=torch.float32, device="cpu")

    @property
    def means(self) -> torch.Tensor:
        """Of each channel: fp32 [C]."""
        if self._sums is None:
            raise ValueError("nothing was observed")
        return (self._sums * (len(self._sums) / self.values)).float().cpu()


def _step(channels: int, height: int = 1, width: int = 1) -> int:
    """Every how-manyth pixel of a map is counted.

    It has no divisor in common with the width, so that pixels of all columns are.
    """
    step = max(1, channels * height * width // COUNTED)
    while math.gcd(step, width) > 1:
        step -= 1
    return step
