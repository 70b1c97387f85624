"""What `fastres.benchmark` measured: figures, ratios with their intervals, and the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from fastres.errors import InputError
from fastres.text import json_text, render

RESAMPLES = 2000
UNSTEADY = 3.0  # mean over fastest call
_PACKAGES = ("fastres", "openvino", "onnxruntime", "triton", "tensorrt")


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the baseline: the median over rounds, and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g}x [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Measurement:
    """One target at one batch size.

    Args:
        throughput: images per second, all timed calls together.
        latency_ms: of one call, by percentile: `latency_ms["p99"]`.
        samples: timed calls.
        round_ms: median latency within each round; entries of one index were timed together.
        speedup: over the baseline at the same batch size.
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

    @property
    def mean_ms(self) -> float:
        """Of one call."""
        return 1e3 * self.batch_size / self.throughput


@dataclass(frozen=True)
class Machine:
    """Where it was measured. `threads` are torch's; `versions` lists what is installed."""

    cpu: str
    cores: int
    threads: int
    gpu: str | None
    versions: dict[str, str]

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        gpu = f", {self.gpu}" if self.gpu else ""
        return f"{self.cpu}, {self.cores} cores, {self.threads} threads{gpu}; {versions}"


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
            replace(m, speedup=_ratio(self.of(baseline, m.batch_size).round_ms, m, self.seed))
            for m in self.measurements
        )
        return replace(self, baseline=baseline, measurements=rated)

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
        table = Table(title="latency in ms; ratios are medians over paired rounds, 95 % interval")
        columns = ("batch", "target", "precision", "img/s", *shown, "min", "calls")
        for column in (*columns, f"speed over {self.baseline}"):
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
                m.precision,
                f"{m.throughput:.1f}",
                *times,
                str(m.samples),
                rate,
            )
        return "\n".join([str(self.machine), render(table, width=160), *self.unsteady])


def machine() -> Machine:
    """The facts about this machine and installation that a figure depends on."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0))
    return Machine(_cpu_model(), cores, torch.get_num_threads(), gpu, versions)


def bootstrap(ratios: Sequence[float], seed: int = 0) -> Ratio:
    """The median of paired ratios with the bootstrap's 95 % interval (percentile method)."""
    values = np.asarray(ratios, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[drawn], axis=1), (2.5, 97.5))
    return Ratio(float(np.median(values)), float(low), float(high))


def _ratio(baseline_ms: Sequence[float], measurement: Measurement, seed: int) -> Ratio:
    pairs = zip(baseline_ms, measurement.round_ms, strict=True)
    return bootstrap([theirs / own for theirs, own in pairs], seed)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
