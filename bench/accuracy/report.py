"""Answers of several engines to the same pictures: top-1, paired differences, agreement.

Pictures are the units of every interval: neither the damaged versions of one picture nor the
answers of two engines to it are independent of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from fastres.calib.thresholds import ALGORITHMS
from fastres.text import render
from fastres.timing.machine import Machine

BASELINE, AUTO, KEPT = "fp32", "int8 auto", "int8 auto, max_drop"
FIXED = tuple(f"int8 {name}" for name in ALGORITHMS)
MAX_DROP, AGREEMENT = 0.003, 0.995  # what int8 is held against
CLEAN, DAMAGED, ALL = "clean", "damaged", "all"
_Z = 1.959964  # 95 % of a normal distribution lie within so many deviations


@dataclass(frozen=True)
class Interval:
    """A difference of two shares of right answers, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        value, low, high = (f"{100 * v:+.2f}" for v in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


@dataclass(frozen=True)
class Figures:
    """What one engine scored on some versions of the pictures.

    Args:
        top1: share of right answers.
        difference: of that to the baseline's share, paired.
        agreement: share of answers that are the baseline's, right or wrong.
        lost, won, other: answers that are not the baseline's, where that was right, where the
            engine's own is, and where neither is.
    """

    predictions: int
    top1: float
    difference: Interval
    agreement: float
    lost: int
    won: int
    other: int


@dataclass(frozen=True)
class Brief:
    """The same for one version of the pictures."""

    top1: float
    agreement: float


@dataclass(frozen=True)
class Row:
    """One engine: by part (clean, damaged, all), and by version of the pictures."""

    name: str
    parts: dict[str, Figures]
    versions: dict[str, Brief]


@dataclass(frozen=True)
class Section:
    """One network on one backend; `notes` say what is missing, what was chosen, and why."""

    network: str
    backend: str
    pictures: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    @property
    def best(self) -> Row | None:
        """Of the five fixed algorithms, the one that scored most; of equals, that agrees most."""
        fixed = [row for row in self.rows if row.name in FIXED]
        return max(
            fixed, key=lambda row: (row.parts[ALL].top1, row.parts[ALL].agreement), default=None
        )

    @property
    def shown(self) -> tuple[str, ...]:
        """The parts that differ from each other."""
        parts = tuple(self.rows[0].parts)
        return parts if DAMAGED in parts else (CLEAN,)

    def __str__(self) -> str:
        lines = [render(_table(self), width=170)]
        if self.best is not None:
            lines.append(render(_verdicts(self), width=170))
            lines += [render(_versions(self), width=170)] if DAMAGED in self.shown else []
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class Report:
    """All sections, where they were measured, and by which settings."""

    machine: Machine
    settings: dict[str, Any]
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.sections), *self.notes, f"measured on {self.machine}"])


def section(
    network: str,
    backend: str,
    versions: Sequence[str],
    answers: Mapping[str, np.ndarray],
    labels: np.ndarray,
    notes: Sequence[str] = (),
) -> Section:
    """Scores every engine against the labels and against the baseline.

    Args:
        versions: of the pictures, CLEAN among them; names of the answers' first dimension.
        answers: by engine, the baseline among them: classes [versions, N].
        labels: [N].
    """
    clean = np.array([version == CLEAN for version in versions])
    parts = {CLEAN: clean, DAMAGED: ~clean, ALL: np.full_like(clean, True)}
    if clean.all():
        del parts[DAMAGED]
    base = answers[BASELINE]
    return Section(
        network,
        backend,
        len(labels),
        tuple(
            Row(
                name,
                {part: figures(own[rows], base[rows], labels) for part, rows in parts.items()},
                {
                    version: Brief(float((mine == labels).mean()), float((mine == its).mean()))
                    for version, mine, its in zip(versions, own, base, strict=True)
                },
            )
            for name, own in answers.items()
        ),
        tuple(notes),
    )


def figures(own: np.ndarray, base: np.ndarray, labels: np.ndarray) -> Figures:
    """Scores answers [versions, N] against the baseline's and labels [N]."""
    right, before, differs = own == labels, base == labels, own != base
    return Figures(
        own.size,
        float(right.mean()),
        paired(right, before),
        float(1 - differs.mean()),
        int((differs & before).sum()),
        int((differs & right).sum()),
        int((differs & ~before & ~right).sum()),
    )


def paired(right: np.ndarray, before: np.ndarray) -> Interval:
    """The mean difference between two engines' right answers, with its 95 % interval.

    With d_i the mean over the versions of picture i of right - before, it is
    mean(d) ± 1.96 std(d) / sqrt(N). Where no picture changed, the variance is not known to be 0:
    the bounds are then ±3 / N, past which a change would have shown itself in 95 % of the cases.

    Args:
        right, before: [versions, N], whether the answer was right.
    """
    each = (right.astype(np.float64) - before).mean(axis=0)
    value, count = float(each.mean()), len(each)
    if not each.any():
        half = min(1.0, 3 / count)
    else:
        half = _Z * float(each.std(ddof=1)) / count**0.5 if count > 1 else 1.0
    return Interval(value, value - half, value + half)


def _verdicts(section: Section) -> Table:
    """Whether int8 keeps to what it is held against."""
    table = Table(title=f"{section.network} on {section.backend}: int8 against {BASELINE}")
    same, drop = f"{100 * AGREEMENT:g} % the same", f"at most {100 * MAX_DROP:g} points less"
    columns = ("engine", "pictures", "points", drop, "same", same, "differ")
    for column in (*columns, f"{BASELINE} right", "int8 right", "neither"):
        table.add_column(column, no_wrap=True)
    for how, row in (("best of five", section.best), ("own choice", section.row(AUTO))):
        for part in section.shown if row is not None else ():
            assert row is not None
            own = row.parts[part]
            counts = (own.lost + own.won + own.other, own.lost, own.won, own.other)
            table.add_row(
                f"{row.name} ({how})",
                part,
                str(own.difference),
                _judged(own.difference),
                f"{own.agreement:.3%}",
                "yes" if own.agreement >= AGREEMENT else "NO",
                *map(str, counts),
            )
        table.add_section()
    return table


def _versions(section: Section) -> Table:
    """Where the answers differ: each version of the pictures by itself."""
    table = Table(title=f"{section.network} on {section.backend}: version by version")
    table.add_column("pictures", no_wrap=True)
    wanted = [section.row(name) for name in (BASELINE, "bf16", AUTO)] + [section.best]
    rows = [row for row in wanted if row is not None]
    for row in rows:
        table.add_column(row.name, justify="right", no_wrap=True)
        if row.name != BASELINE:
            table.add_column("same", justify="right", no_wrap=True)
    for version in rows[0].versions:
        cells = []
        for row in rows:
            found = row.versions[version]
            cells += [f"{found.top1:.2%}"]
            cells += [f"{found.agreement:.2%}"] if row.name != BASELINE else []
        table.add_row(version, *cells)
    return table


def _judged(difference: Interval) -> str:
    if difference.low >= -MAX_DROP:
        return "yes"
    return "yes, but not its interval" if difference.value >= -MAX_DROP else "NO"


def _table(section: Section) -> Table:
    total = section.rows[0].parts[ALL].predictions
    table = Table(
        title=f"{section.network} on {section.backend}: {section.pictures} pictures, "
        f"{total} predictions an engine",
        min_width=110,
        caption=f"against {BASELINE}: points, with the 95 % interval over pictures; same: share of "
        f"answers that are {BASELINE}'s",
    )
    table.add_column("engine", no_wrap=True)
    for part in section.shown:
        for column in (part, f"against {BASELINE}", "same"):
            table.add_column(column, justify="right", no_wrap=True)
    for row in section.rows:
        cells = []
        for part in section.shown:
            found = row.parts[part]
            base = row.name == BASELINE
            compared = ("", "") if base else (str(found.difference), f"{found.agreement:.2%}")
            cells += [f"{found.top1:.2%}", *compared]
        table.add_row(row.name, *cells)
    return table
