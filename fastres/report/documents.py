"""What the JSON documents hold that a report is made of; `fastres.report.reading` reads them.

What `fastres.report.records` says of fields holds for these, too.
"""

from __future__ import annotations

import math

import msgspec

from fastres.report.records import (
    Amount,
    Comparison,
    Count,
    Difference,
    Finite,
    Interval,
    Machine,
    Measurement,
    Paired,
    Profile,
    Rate,
    Real,
    Run,
    Versions,
)


class Bench(msgspec.Struct, frozen=True):
    """What `fastres bench` writes, and bench.cpu.int8, which has `model` and `sqnr_db`.

    Args:
        backends: where ours run, by target.
        lanes: for each of ours the peers that ran the same model in the same precision.
        ratios: of each of ours to each of these peers.
    """

    measurements: tuple[Measurement, ...]
    machine: Machine = Machine()
    run: Run = Run()
    models: tuple[str, ...] = ()
    model: str = ""
    backends: dict[str, str] = {}
    left_out: dict[str, str] = {}
    baseline: str = ""
    seed: int | None = None
    parity: tuple[Difference, ...] = ()
    profiles: tuple[Profile, ...] = ()
    rates: dict[str, Rate] = {}
    versions: tuple[Versions, ...] = ()
    comparison: Comparison | None = None
    sqnr_db: dict[str, Real] = {}
    lanes: dict[str, tuple[str, ...]] = {}
    ratios: tuple[Paired, ...] = ()

    def is_ours(self, target: str) -> bool:
        """Older documents have no lanes, whose keys are ours."""
        return target in self.lanes if self.lanes else "fastres" in target

    def runtime_of(self, target: str) -> str:
        """A target without what all names of its lane begin with: the model and the precision."""
        for ours, peers in self.lanes.items():
            if target in (ours, *peers):
                return target.removeprefix(ours.removesuffix("fastres"))
        return target

    def beside_baseline(self, target: str) -> bool:
        """Whether it ran what the baseline ran, as far as the document tells."""
        return not self.lanes or any(
            {target, self.baseline} <= {ours, *peers} for ours, peers in self.lanes.items()
        )

    def fastest_peer(self, ours: str, batch_size: int) -> Paired | None:
        """Ours over the peer that it is least ahead of; None where it was compared with none."""
        found = [r for r in self.ratios if (r.ours, r.batch_size) == (ours, batch_size)]
        return min(found, key=_closeness, default=None)

    def model_of(self, measurement: Measurement) -> str:
        """Older documents say it once for all measurements."""
        only = self.models[0] if len(self.models) == 1 else ""
        return measurement.model or self.model or only


class Point(msgspec.Struct, frozen=True):
    x: Finite
    median: Amount = None
    low: Amount = None
    high: Amount = None


class Fit(msgspec.Struct, frozen=True):
    """y = slope * x + intercept."""

    slope: Finite
    intercept: Finite
    r2: Real = None
    worst: Amount = None  # the most that a point is off, as a fraction of it


class Series(msgspec.Struct, frozen=True):
    """How long a target takes as one thing grows."""

    name: str
    target: str
    points: tuple[Point, ...]
    x_label: str = ""
    unit: str = "ms"
    fit: Fit | None = None


class Scaling(msgspec.Struct, frozen=True):
    """What `fastres bench` writes of how time grows."""

    series: tuple[Series, ...]
    machine: Machine = Machine()
    run: Run = Run()


class Gap(msgspec.Struct, frozen=True):
    """A difference of two shares, with its 95 % interval."""

    value: Real = None
    low: Real = None
    high: Real = None


class Figures(msgspec.Struct, frozen=True):
    top1: Amount = None
    difference: Gap = Gap()
    agreement: Amount = None


class Scored(msgspec.Struct, frozen=True):
    """One engine's answers, by part of the pictures."""

    name: str
    parts: dict[str, Figures]


class Trial(msgspec.Struct, frozen=True):
    """One network on one backend."""

    network: str
    backend: str
    pictures: Count
    rows: tuple[Scored, ...]
    notes: tuple[str, ...] = ()


class Accuracy(msgspec.Struct, frozen=True):
    """What bench.accuracy prints with --json."""

    sections: tuple[Trial, ...]
    machine: Machine = Machine()
    run: Run = Run()
    notes: tuple[str, ...] = ()


class Settled(msgspec.Struct, frozen=True):
    """One network in one precision against the model in float64."""

    network: str
    precision: str
    pictures: Count = 0
    failure: str = ""
    sqnr_db: Real = None
    cosine: Real = None
    top1: Amount = None
    layers: Count = 0
    median_db: Real = None
    worst: dict[str, Real] = {}


class Parities(msgspec.Struct, frozen=True):
    """What bench.accuracy writes of settled networks."""

    rows: tuple[Settled, ...]
    machine: Machine = Machine()
    run: Run = Run()
    notes: tuple[str, ...] = ()


class GuardTrial(msgspec.Struct, frozen=True):
    """Three runs: speeds of the second and of a slowed third over the first, and the verdicts."""

    same: Interval
    same_verdict: str
    slowed: Interval
    slowed_verdict: str
    agree: bool  # whether the intervals of all ratios of the first two runs overlap
    seconds: Amount = None  # of one run


class GuardTrials(msgspec.Struct, frozen=True):
    """What bench.cpu.guard_trials writes.

    Args:
        limit: the fraction that the guard was to tolerate.
        model: what was timed, and `slower` what took its place in every third run.
    """

    trials: tuple[GuardTrial, ...]
    machine: Machine = Machine()
    run: Run = Run()
    limit: Amount = None
    model: str = ""
    slower: str = ""

    @property
    def false_alarms(self) -> int:
        return sum(trial.same_verdict == "slower" for trial in self.trials)

    @property
    def caught(self) -> int:
        return sum(trial.slowed_verdict == "slower" for trial in self.trials)

    @property
    def agreeing(self) -> int:
        return sum(trial.agree for trial in self.trials)


Document = Bench | Scaling | Accuracy | Parities | GuardTrials


def _closeness(found: Paired) -> float:
    """What is not known comes last."""
    speed = found.speed
    return math.inf if speed is None or speed.median is None else speed.median
