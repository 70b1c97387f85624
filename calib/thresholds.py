"""From a histogram of magnitudes to the magnitude at which int8 saturates: five algorithms.

All take the same histogram. int8 is symmetric here, with 127 steps of threshold / 127 on each side
of zero. `entropy` is from S. Migacz, 8-bit Inference with TensorRT (GTC 2017); `percentile` and
`mse` are described in H. Wu et al., Integer Quantization for Deep Learning Inference (2020),
section 5.1, which compares them with it and with `minmax`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

Algorithm = Literal["minmax", "percentile", "percentile-99.9", "entropy", "mse"]
LEVELS = 128  # magnitudes of a symmetric int8
_STEP = 8  # candidates of a search are this many bins apart: 0.4 % of the range or less

Counts = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Histogram:
    """counts[i] values v with i * width <= |v| < (i + 1) * width; `largest` is the largest |v|."""

    counts: Counts
    width: float
    largest: float

    @property
    def used(self) -> int:
        """Bins up to that of the largest value."""
        occupied = np.flatnonzero(self.counts)
        return int(occupied[-1]) + 1 if len(occupied) else 0

    def quantile(self, share: float) -> float:
        """The magnitude that this share of the values does not exceed, linear within a bin."""
        total = int(self.counts.sum())
        if total == 0:
            return 0.0
        below = np.cumsum(self.counts)
        wanted = share * total
        i = int(np.searchsorted(below, wanted))
        before = int(below[i - 1]) if i else 0
        part = (wanted - before) / max(1, int(self.counts[i]))
        return min((i + part) * self.width, self.largest)


def thresholds(histogram: Histogram) -> dict[Algorithm, float]:
    """Every algorithm's threshold, as a float32; 0 for a tensor that was zero throughout."""
    if histogram.largest == 0:
        return dict.fromkeys(ALGORITHMS, 0.0)
    return {name: float(np.float32(find(histogram))) for name, find in ALGORITHMS.items()}


def minmax(histogram: Histogram) -> float:
    """The largest magnitude: nothing saturates."""
    return histogram.largest


def percentile(histogram: Histogram, share: float = 0.9999) -> float:
    """The magnitude that all but 1 - share of the values stay below."""
    return histogram.quantile(share)


def entropy(histogram: Histogram) -> float:
    """The threshold of least Kullback-Leibler divergence between values and quantised values.

    For every candidate the histogram up to there, with what lies beyond added to its last occupied
    bin, is compared with the same histogram in 128 levels, each spread evenly over its occupied
    bins.
    Zeros are left out, as a ReLU's make up half of the values and are exact at any threshold: the
    first bin takes the second's count.
    """
    counts, width = _coarse(histogram)
    counts[0] = counts[1]
    used = len(counts)
    if used <= LEVELS:
        return histogram.largest
    ends = np.array([*range(LEVELS, used, _STEP), used])
    ends = ends[_up_to(counts)[ends] > 0]
    best = int(np.argmin(_divergences(counts, ends)))
    return float(min(ends[best] * width, histogram.largest))


def mse(histogram: Histogram) -> float:
    """The threshold of least mean squared error of the quantised values."""
    counts, width = _coarse(histogram)
    centres = (np.arange(len(counts)) + 0.5) * width
    best, threshold = np.inf, histogram.largest
    for end in (*range(LEVELS, len(counts), _STEP), len(counts)):
        candidate = min(end * width, histogram.largest)
        step = candidate / (LEVELS - 1)
        rounded = np.minimum(np.rint(centres / step), LEVELS - 1) * step
        error = float(counts @ (centres - rounded) ** 2)
        if error < best:
            best, threshold = error, candidate
    return threshold


def _coarse(histogram: Histogram) -> tuple[Floats, float]:
    """Pairs of bins joined, up to the largest value: 1025 to 2048 bins of a full observer's."""
    counts = histogram.counts.reshape(-1, 2).sum(1)
    used = max(1, int(np.flatnonzero(counts)[-1]) + 1)
    return counts[: max(2, used)].astype(np.float64), 2 * histogram.width


def _divergences(counts: Floats, ends: np.ndarray[Any, np.dtype[np.int64]]) -> Floats:
    """sum p log(p / q) for each end, p and q made to sum to 1.

    p is counts[:end] with what lies beyond added to its last occupied bin; q is counts[:end] in 128
    levels, each spread evenly over its occupied bins. q is the same all over a level, so sums over
    bins are differences of running sums at the edges of levels: sum p log p over all bins, less
    sum p log q over levels.
    """
    occupied = counts > 0
    below, bins = _up_to(counts), _up_to(occupied.astype(np.float64))
    logs = _up_to(_times_log(counts, counts))
    last = np.maximum.accumulate(np.where(occupied, np.arange(len(counts)), -1))[ends - 1]
    inside, beyond = below[ends], below[-1] - below[ends]

    edges = -(-np.arange(LEVELS + 1) * ends[:, None] // LEVELS)  # rounded up: the first bin of each
    sums, spread_over = np.diff(below[edges]), np.diff(bins[edges])
    height = sums / np.maximum(1, spread_over)
    of_last = np.take_along_axis(height, (last * LEVELS // ends)[:, None], 1)[:, 0]

    there = counts[last]
    p_log_p = logs[ends] - _times_log(there, there) + _times_log(there + beyond, there + beyond)
    p_log_q = _times_log(sums, height).sum(1) + _times_log(beyond, of_last)
    total = below[-1]
    found: Floats = (p_log_p - p_log_q) / total - np.log(total) + np.log(inside)
    return found


def _up_to(values: Floats) -> Floats:
    """[n + 1]: element i is the sum of the first i values."""
    return np.concatenate([[0.0], np.cumsum(values)])


def _times_log(factor: Floats, x: Floats) -> Floats:
    """factor log(x), 0 where factor is."""
    return factor * np.log(np.where(factor > 0, x, 1.0))


ALGORITHMS: Mapping[Algorithm, Callable[[Histogram], float]] = {
    "minmax": minmax,
    "percentile": percentile,
    "percentile-99.9": lambda histogram: percentile(histogram, 0.999),
    "entropy": entropy,
    "mse": mse,
}
assert set(ALGORITHMS) == set(get_args(Algorithm))
