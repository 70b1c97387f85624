"""Ratios of paired times and what is known of them: medians with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
LIMITS = (2.5, 97.5)  # percentiles: a 95 % interval


@dataclass(frozen=True)
class Ratio:
    """A ratio's median over rounds, and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g}x [{self.low:.3g}, {self.high:.3g}]"

    def overlaps(self, other: Ratio) -> bool:
        return self.low <= other.high and other.low <= self.high


def bootstrap(ratios: Sequence[float], seed: int = 0) -> Ratio:
    """The median of paired ratios with the bootstrap's 95 % interval (percentile method)."""
    values = np.asarray(ratios, dtype=np.float64)
    low, high = np.percentile(_medians(values, np.random.default_rng(seed)), LIMITS)
    return Ratio(float(np.median(values)), float(low), float(high))


def change(now: Sequence[float], then: Sequence[float], seed: int = 0) -> Ratio:
    """How the median of one run's ratios stands to that of another's, both resampled."""
    new, old = np.asarray(now, dtype=np.float64), np.asarray(then, dtype=np.float64)
    draw = np.random.default_rng(seed)
    low, high = np.percentile(_medians(new, draw) / _medians(old, draw), LIMITS)
    return Ratio(float(np.median(new) / np.median(old)), float(low), float(high))


def _medians(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    drawn = draw.integers(0, len(values), (RESAMPLES, len(values)))
    return np.asarray(np.median(values[drawn], axis=1))
