"""How right: SQNR, top-1 of INT8, and parity with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastres.report.documents import Accuracy, Bench, Gap, Parities, Settled, Trial
from fastres.report.html import (
    NOTHING,
    Cell,
    Column,
    Html,
    Number,
    figure,
    figures,
    items,
    join,
    table,
    tag,
)
from fastres.report.numbers import number, percent, short
from fastres.report.plotting import MUTED, bars, chart, colour, label, legend, linear_or_log
from fastres.report.speed import called

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALL = "all"  # the part that holds every picture
_KINDS = {"logits": 0, "middle layer": 1}
_UNKNOWN = "infinite or not known"  # either is null in JSON


def accuracy_parts(documents: Mapping[str, Accuracy]) -> Html:
    """Top-1 of each engine and what INT8 costs, network by network."""
    trials = [trial for document in documents.values() for trial in document.sections if trial.rows]
    notes = [note for document in documents.values() for note in document.notes]
    tables = join(join([_top1_table(trial), items(trial.notes)]) for trial in trials)
    return join([figures([_top1_chart(trial) for trial in trials]), tables, items(notes)])


def sqnr_charts(parities: Mapping[str, Parities], benches: Mapping[str, Bench]) -> Html:
    """Signal over quantisation noise, by network and precision."""
    drawn = [
        _bars(
            f"SQNR of settled networks, {name}",
            [f"{row.network} {row.precision}" for row in document.rows],
            {
                "logits": [row.sqnr_db for row in document.rows],
                "middle layer": [row.median_db for row in document.rows],
            },
        )
        for name, document in parities.items()
        if document.rows
    ]
    drawn += [
        _bars(
            f"SQNR of the logits, {bench.model or name}",
            list(bench.sqnr_db),
            {"logits": list(bench.sqnr_db.values())},
        )
        for name, bench in benches.items()
        if bench.sqnr_db
    ]
    return figures(drawn)


def parity_tables(benches: Mapping[str, Bench], parities: Mapping[str, Parities]) -> Html:
    """Errors beside their bounds: of what was timed, and of settled networks."""
    timed = [
        _parity_table(f"{called(name, benches)}what was timed", bench)
        for name, bench in benches.items()
        if bench.parity
    ]
    settled = [
        join([_settled_table(name, document.rows), items(document.notes)])
        for name, document in parities.items()
    ]
    return join([*timed, *settled])


def verdict(passed: bool) -> Html:
    return tag("span", "passed", class_="good") if passed else tag("span", "FAILED", class_="bad")


def points(gap: Gap) -> Number:
    """A difference of shares in points: -0.06 [-0.14, +0.02]."""
    if gap.value is None:
        return number(None)
    bounds = ""
    if gap.low is not None and gap.high is not None:
        bounds = f" [{100 * gap.low:+.2f}, {100 * gap.high:+.2f}]"
    return Number(gap.value, f"{100 * gap.value:+.2f}{bounds}")


def _parity_table(title: str, bench: Bench) -> Html:
    columns = [Column("target"), Column("model"), Column("precision"), Column("batch", True)]
    headings = ("rms error", "allowed", "largest error", "allowed")
    columns += [Column(heading, numeric=True) for heading in headings] + [Column("parity")]
    rows: list[Sequence[Cell]] = [
        (
            row.target,
            row.model,
            row.precision,
            number(row.batch_size),
            *(number(x) for x in (row.rms, row.allowed_rms, row.largest, row.allowed_largest)),
            verdict(row.passed),
        )
        for row in bench.parity
    ]
    return table(f"{title}: error of the results, and what is allowed", columns, rows)


def _settled_table(name: str, rows: Sequence[Settled]) -> Html:
    columns = [Column("network"), Column("precision"), Column("parity")]
    headings = ("logits SQNR dB", "cosine", "top-1 same", "middle layer dB", "layers")
    columns += [Column(heading, numeric=True) for heading in headings]
    columns += [Column("worst layers, dB", wraps=True)]
    cells = [
        (
            row.network,
            row.precision,
            verdict(not row.failure),
            number(row.sqnr_db, ".1f"),
            number(row.cosine, ".6f"),
            percent(row.top1),
            number(row.median_db, ".1f"),
            number(row.layers),
            ", ".join(f"{layer} {short(db)}" for layer, db in row.worst.items()),
        )
        for row in rows
    ]
    failures = items(f"{r.network} in {r.precision}: {r.failure}" for r in rows if r.failure)
    caption = f"{name}: settled networks against the model in float64"
    return join([table(caption, columns, cells), failures])


def _top1_table(trial: Trial) -> Html:
    parts = list(dict.fromkeys(part for row in trial.rows for part in row.parts))
    columns = [Column("engine")]
    for part in parts:
        headings = (f"{part}: top-1", "points against fp32", "same answers")
        columns += [Column(heading, numeric=True) for heading in headings]
    rows = []
    for row in trial.rows:
        cells: list[Cell] = [row.name]
        for part in parts:
            found = row.parts.get(part)
            if found is None:
                cells += [NOTHING] * 3
            elif row.name == "fp32":  # it is the one that the others are compared with
                cells += [percent(found.top1, ".2f"), NOTHING, NOTHING]
            else:
                same = percent(found.agreement, ".2f")
                cells += [percent(found.top1, ".2f"), points(found.difference), same]
        rows.append(cells)
    caption = (
        f"{trial.network} on {trial.backend}: {trial.pictures:,} pictures; differences in points, "
        "with their 95 % intervals over pictures"
    )
    return table(caption, columns, rows)


def _top1_chart(trial: Trial) -> Html:
    part = ALL if ALL in trial.rows[0].parts else next(iter(trial.rows[0].parts), "")
    gaps = {
        row.name: row.parts[part].difference
        for row in trial.rows
        if part in row.parts and row.name != "fp32"
    }

    def paint(axes: Axes) -> None:
        axes.axvline(0, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        for y, gap in enumerate(gaps.values()):
            if gap.low is not None and gap.high is not None:
                axes.plot([100 * gap.low, 100 * gap.high], [y, y], color=colour(0), linewidth=2.2)
            if gap.value is not None:
                axes.plot([100 * gap.value], [y], "o", color=colour(0), markersize=6.5)
        axes.set_yticks(range(len(gaps)), list(map(label, gaps)))
        axes.set_ylim(len(gaps) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        linear_or_log(axes, "x", [])
        axes.set_xlabel("top-1, points against fp32")

    title = f"{trial.network} on {trial.backend}"
    said = "; ".join(f"{name} {points(gap).text}" for name, gap in gaps.items())
    drawn = chart(
        f"Top-1 of {title} against fp32, in points: {said}.",
        62 + 20 * max(len(gaps), 2),
        paint,
    )
    caption = f"{title}: change of top-1 against fp32 on {part} pictures, 95 % intervals"
    return figure(drawn, caption)


def _bars(title: str, names: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> Html:
    width = 0.8 / len(series)

    def paint(axes: Axes) -> None:
        for kind, values in series.items():
            i = _KINDS[kind]
            places = [place + (i - (len(series) - 1) / 2) * width for place in range(len(names))]
            bars(axes, places, values, width * 0.9, i)
        axes.set_yticks(range(len(names)), list(map(label, names)))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("dB")

    said = "; ".join(
        f"{name} " + ", ".join(f"{kind} {_decibels(values[i])}" for kind, values in series.items())
        for i, name in enumerate(names)
    )
    drawn = chart(f"{title}: {said}.", 60 + 24 * len(names), paint)
    absent = any(value is None for values in series.values() for value in values)
    caption = f"{title}; more is better" + f"; no bar: {_UNKNOWN}" * absent
    return figure(drawn, caption, legend({k: _KINDS[k] for k in series}, barred=True))


def _decibels(value: float | None) -> str:
    return _UNKNOWN if value is None else short(value, "dB")
