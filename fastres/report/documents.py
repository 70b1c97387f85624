"""What the JSON documents hold that a report is made of; `fastres.report.reading` reads them.

A field that fastres came to write later has a default, a number may be null where it was NaN, and
fields that nobody here knows are passed over.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

Finite = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]  # beyond, a chart has no axis for it
Real = Finite | None
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e30)] | None
Count = Annotated[int, msgspec.Meta(ge=0, le=10**18)]
Size = Annotated[int, msgspec.Meta(ge=1, le=10**18)]


class Interval(msgspec.Struct, frozen=True):
    """A median and its 95 % interval."""

    median: Real = None
    low: Real = None
    high: Real = None


class Machine(msgspec.Struct, frozen=True):
    cpu: str = ""
    cores: Count = 0
    threads: Count = 0
    gpu: str | None = None
    versions: dict[str, str] = {}
    state: dict[str, str] = {}


class Run(msgspec.Struct, frozen=True):
    """By which command, when, and for how long."""

    argv: tuple[str, ...] = ()
    commit: str | None = None
    date: str = ""
    seconds: Amount = None
    duration_s: Amount = None
    launches: Count | None = None
    seed: int | None = None  # of bench/scaling.py; `fastres bench` has it beside `run`
    transfers: str = ""
    finished: bool = True


class Measurement(msgspec.Struct, frozen=True):
    """One target at one batch size; `quantiles_ms` go from the least to the most in even steps."""

    target: str
    batch_size: Size
    throughput: Amount
    precision: str = ""
    model: str = ""
    latency_ms: dict[str, Amount] = {}
    min_ms: Amount = None
    samples: Count = 0
    quantiles_ms: tuple[Amount, ...] = ()
    speedup: Interval | None = None
    ran: str | None = None  # precisions that its nodes really run in


class Difference(msgspec.Struct, frozen=True):
    """How far a target's results are from the reference's, and how far they may be."""

    target: str
    batch_size: Size
    model: str = ""
    precision: str = ""
    rms: Amount = None
    largest: Amount = None
    allowed_rms: Amount = None
    allowed_largest: Amount = None

    @property
    def passed(self) -> bool:
        return _within(self.rms, self.allowed_rms) and _within(self.largest, self.allowed_largest)


class Work(msgspec.Struct, frozen=True):
    """Time of a node or a group, and what was done in it; a row of `fastres.profiling.Profile`."""

    name: str
    milliseconds: Amount
    share: Amount = None
    flop: Count = 0
    bytes: Count = 0
    op: str = ""
    kernel: str = ""
    precision: str = ""
    gflop_per_s: Amount = None
    gb_per_s: Amount = None
    roofline: Amount = None


class Profile(msgspec.Struct, frozen=True):
    rows: tuple[Work, ...]
    groups: tuple[Work, ...]
    total: Work
    model: str = ""
    batch_size: Size = 1
    target: str = ""
    precision: str = ""
    precision_ran: str = ""  # how `fastres profile --json` calls it
    backend: str = ""

    @property
    def title(self) -> str:
        where = self.target or self.backend
        words = (self.model, where, self.precision or self.precision_ran)
        told = [w for w in words if w and (w == where or w not in where.split())]
        return ", ".join([*told, f"batch {self.batch_size}"])


class Rate(msgspec.Struct, frozen=True):
    """What a machine can do at most in one precision."""

    gflop_per_s: Amount = None
    gb_per_s: Amount = None


class Stage(msgspec.Struct, frozen=True):
    """A layer group in both versions of a network."""

    group: str
    v1_ms: Amount = None
    v15_ms: Amount = None
    v1_macs: Count = 0
    v15_macs: Count = 0
    difference: Interval | None = None  # ms that v1.5 takes longer; least and most over turns


class Versions(msgspec.Struct, frozen=True):
    """A network as v1 and as v1.5; every ratio is v1.5 over v1."""

    net: str
    precision: str
    batch_size: Size
    v1_img_s: Amount = None
    v15_img_s: Amount = None
    ratio: Interval | None = None
    macs_ratio: Amount = None
    roofline_ratio: Amount = None
    groups: tuple[Stage, ...] = ()


class Change(msgspec.Struct, frozen=True):
    """The speed of one target now, over that in an earlier run."""

    target: str
    batch_size: Size
    verdict: str
    model: str = ""
    precision: str = ""
    yardstick: str = ""
    change: Interval = Interval()


class Comparison(msgspec.Struct, frozen=True):
    base: str = ""
    limit: Amount = None
    rows: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()


class Paired(msgspec.Struct, frozen=True):
    """How many times as fast one of ours is as a peer with the same model and precision."""

    ours: str
    peer: str
    batch_size: Size
    model: str = ""
    precision: str = ""
    speed: Interval | None = None

    @property
    def runtime(self) -> str:
        """The peer without what all names of its lane begin with: the model and the precision."""
        return self.peer.removeprefix(self.ours.removesuffix("fastres"))


class Bench(msgspec.Struct, frozen=True):
    """What `fastres bench` writes, and bench/int8.py, which has `model` and `sqnr_db`.

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
    """What bench/accuracy.py prints with --json."""

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
    """What bench/accuracy.py writes of settled networks."""

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
    """What bench/guard_trials.py writes.

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


def _within(value: float | None, allowed: float | None) -> bool:
    """Where there is no bound nothing is outside; a value that is NaN is outside of any."""
    return allowed is None or (value is not None and value <= allowed)
