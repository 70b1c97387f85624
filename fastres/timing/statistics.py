"""Ratios of paired times and what is known of them: medians, means over launches, intervals.

A process that is started again is not as fast as it was: where its memory lies differs, by which
PyTorch's eager mode was seen to change by 6 % and OpenVINO by 1 %. Rounds of one process cannot
show that. So what is timed is launched several times, the median over rounds of each launch is one
observation, and the interval is Student's for their mean, in logarithms. Where the bootstrap over
the rounds within launches gives a wider one, that is taken.

Source: T. Kalibera, R. Jones, Rigorous benchmarking in reasonable time (2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
FEWEST = 3  # rounds in all: fewer have no interval
LIMITS = (2.5, 97.5)  # percentiles: a 95 % interval
# Student's t for 95 %, two-sided, by degrees of freedom from 1 on
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)

Launches = Sequence[Sequence[float]]  # the ratio of each round, by launch


@dataclass(frozen=True)
class Ratio:
    """A ratio, in the middle of what was observed, and its 95 % interval; NaN if there is none."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.median:.3g}x [too few rounds]"
        return f"{self.median:.3g}x [{self.low:.3g}, {self.high:.3g}]"

    def overlaps(self, other: Ratio) -> bool:
        return self.low <= other.high and other.low <= self.high


def estimate(launches: Launches, seed: int = 0) -> Ratio:
    """A ratio: the median of one launch, or the mean of the medians of several."""
    return _around(_Sample.of(launches, np.random.default_rng(seed)), None)


def change(now: Launches, then: Launches, seed: int = 0) -> Ratio:
    """How the ratio of one run stands to that of another."""
    draw = np.random.default_rng(seed)
    return _around(_Sample.of(now, draw), _Sample.of(then, draw))


def bootstrap(ratios: Sequence[float], seed: int = 0) -> Ratio:
    """The median of paired ratios with the bootstrap's 95 % interval (percentile method)."""
    return estimate([ratios], seed)


def spread(launches: Launches) -> float:
    """Variance of the logarithm between launches; of a single one, between its rounds."""
    logs = _Sample.of(launches, np.random.default_rng(0)).centres
    if len(logs) == 1:
        logs = np.log(np.asarray(launches[0], dtype=np.float64))
    return float(logs.var(ddof=1)) if len(logs) > 1 else math.inf


@dataclass(frozen=True)
class _Sample:
    """Logarithms: the centre of each launch, and their mean with all rounds drawn anew."""

    centres: np.ndarray
    drawn: np.ndarray
    rounds: int

    @classmethod
    def of(cls, launches: Launches, draw: np.random.Generator) -> _Sample:
        logs = [np.log(np.asarray(rounds, dtype=np.float64)) for rounds in launches]
        centres = np.array([np.median(rounds) for rounds in logs])
        drawn = np.mean([_medians(rounds, draw) for rounds in logs], axis=0)
        return cls(centres, drawn, sum(map(len, logs)))

    @property
    def mean(self) -> float:
        return float(self.centres.mean())

    @property
    def error(self) -> float:
        """Variance of the mean, by the scatter of launches; 0 where there is but one."""
        count = len(self.centres)
        return float(self.centres.var(ddof=1)) / count if count > 1 else 0.0


def _around(sample: _Sample, base: _Sample | None) -> Ratio:
    """The sample's ratio, or its ratio to a base, with the wider of both intervals."""
    samples = [sample] if base is None else [sample, base]
    middle = sample.mean - (base.mean if base is not None else 0.0)
    drawn = sample.drawn - (base.drawn if base is not None else 0.0)
    if min(s.rounds for s in samples) < FEWEST:
        return Ratio(math.exp(middle), math.nan, math.nan)
    low, high = np.percentile(drawn, LIMITS)
    reach = _student(samples) * math.sqrt(sum(s.error for s in samples))
    return Ratio(
        math.exp(middle),
        math.exp(min(float(low), middle - reach)),
        math.exp(max(float(high), middle + reach)),
    )


def _student(samples: Sequence[_Sample]) -> float:
    """Student's t, for two samples with Welch's degrees of freedom."""
    total = sum(s.error for s in samples)
    if total == 0.0:
        return 0.0
    parts = sum(s.error**2 / (len(s.centres) - 1) for s in samples if len(s.centres) > 1)
    freedom = max(1, int(total**2 / parts + 1e-9))
    return _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96


def _medians(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    drawn = draw.integers(0, len(values), (RESAMPLES, len(values)))
    return np.asarray(np.median(values[drawn], axis=1))
