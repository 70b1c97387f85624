"""What `fastres.benchmark` measured: figures, ratios with their intervals, and the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from fastres.errors import InputError
from fastres.text import empty_table, json_text, render_whole
from fastres.timing.machine import Machine
from fastres.timing.statistics import Ratio, estimate
from fastres.timing.turns import Rounds

UNSTEADY = 3.0  # mean over fastest call


@dataclass(frozen=True)
class Measurement:
    """One target at one batch size.

    Args:
        throughput: images per second, all timed calls together.
        latency_ms: of one call, by percentile: `latency_ms["p99"]`.
        samples: timed calls.
        round_ms: median latency within each round; entries of one index were timed together.
        launches: how many of the rounds belong to each launch of the target's process.
        speedup: over the baseline at the same batch size.
        quantiles_ms: of the latency, percentiles 0, 1, ... 100.
        model: which network it ran, where several are compared.
        ran: what its nodes really run in, most frequent first, where that is known.
    """

    target: str
    precision: str
    batch_size: int
    throughput: float
    latency_ms: dict[str, float]
    min_ms: float
    samples: int
    round_ms: tuple[float, ...]
    speedup: Ratio
    quantiles_ms: tuple[float, ...] = ()
    model: str = ""
    ran: str = ""
    launches: tuple[int, ...] = ()

    @property
    def mean_ms(self) -> float:
        """Of one call."""
        return 1e3 * self.batch_size / self.throughput


@dataclass(frozen=True)
class BenchReport:
    """What `benchmark` measured; `str()` is a table."""

    machine: Machine
    baseline: str
    seed: int
    measurements: tuple[Measurement, ...]

    def of(self, target: str, batch_size: int) -> Measurement:
        """The measurement of one target at one batch size.

        Raises:
            InputError: it was not measured.
        """
        for measurement in self.measurements:
            if (measurement.target, measurement.batch_size) == (target, batch_size):
                return measurement
        raise InputError(f"{target!r} was not measured at batch size {batch_size}")

    def against(self, baseline: str) -> BenchReport:
        """The same measurements with their ratios to another target.

        Raises:
            InputError: it was not measured.
        """
        rated = tuple(
            replace(m, speedup=estimate(paired(self.of(baseline, m.batch_size), m), self.seed))
            for m in self.measurements
        )
        return replace(self, baseline=baseline, measurements=rated)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(m.batch_size for m in self.measurements))

    @property
    def unsteady(self) -> tuple[str, ...]:
        """What was slowed down at times by something else, so that its figures mean little."""
        return tuple(
            f"unsteady: {m.target} at batch {m.batch_size} took {m.mean_ms:.2f} ms on average and "
            f"{m.min_ms:.2f} ms at best; something else was running, or its threads got in each "
            "other's way"
            for m in self.measurements
            if m.mean_ms > UNSTEADY * m.min_ms
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json_text(self.to_dict())

    def __str__(self) -> str:
        shown = self.measurements[0].latency_ms
        table = empty_table(
            title=f"latency in ms; speed is that over {self.baseline}, of paired rounds, with its "
            "95 % interval"
        )
        columns = ("batch", "target", "precision", "img/s", *shown, "min", "calls")
        for column in (*columns, "speed"):
            left = column in ("target", "precision")
            table.add_column(column, justify="left" if left else "right", no_wrap=True)
        previous = None
        for m in self.measurements:
            if previous not in (None, m.batch_size):
                table.add_section()
            previous = m.batch_size
            times = [f"{value:.2f}" for value in (*m.latency_ms.values(), m.min_ms)]
            rate = "1x" if m.target == self.baseline else str(m.speedup)
            table.add_row(
                str(m.batch_size),
                m.target,
                m.ran or m.precision,
                f"{m.throughput:.1f}",
                *times,
                str(m.samples),
                rate,
            )
        return "\n".join([str(self.machine), render_whole(table), *self.unsteady])


def by_launch(values: Sequence[float], launches: Sequence[int]) -> list[list[float]]:
    """Values of rounds, a list for each launch; all in one where launches are not told."""
    ends = list(accumulate(launches)) or [len(values)]
    return [list(values[start:end]) for start, end in pairwise([0, *ends])]


def paired(theirs: Measurement, own: Measurement) -> list[list[float]]:
    """How many times as fast `own` was, by round and launch."""
    pairs = zip(theirs.round_ms, own.round_ms, strict=True)
    return by_launch([a / b for a, b in pairs], own.launches)


def measurement(
    target: str,
    precision: str,
    size: int,
    launches: Sequence[Rounds],
    percentiles: Sequence[float],
    model: str = "",
    ran: str = "",
) -> Measurement:
    """What the timed calls of one target say; its ratio is set by `BenchReport.against`."""
    rounds = [calls for launch in launches for calls in launch]
    milliseconds = 1e3 * np.concatenate([np.asarray(calls) for calls in rounds])
    latencies = np.percentile(milliseconds, list(percentiles))
    names = [f"p{p!r}".removesuffix(".0") for p in percentiles]
    return Measurement(
        target,
        precision,
        size,
        float(1e3 * size * len(milliseconds) / milliseconds.sum()),
        {name: float(ms) for name, ms in zip(names, latencies, strict=True)},
        float(milliseconds.min()),
        len(milliseconds),
        tuple(float(1e3 * np.median(calls)) for calls in rounds),
        Ratio(1.0, 1.0, 1.0),
        tuple(float(ms) for ms in np.percentile(milliseconds, range(101))),
        model,
        ran,
        tuple(len(launch) for launch in launches),
    )
