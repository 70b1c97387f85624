"""The records that documents of results consist of; `fastres.report.documents` has the documents.

A field that fastres came to write later has a default, a number may be null where it was NaN, and
fields that nobody here knows are passed over.
"""

from __future__ import annotations

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
    seed: int | None = None  # of bench.cpu.scaling; `fastres bench` has it beside `run`
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
    """Time of a node or a group, and what was done in it; a row of a `Profile`."""

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


def _within(value: float | None, allowed: float | None) -> bool:
    """Where there is no bound nothing is outside; a value that is NaN is outside of any."""
    return allowed is None or (value is not None and value <= allowed)
