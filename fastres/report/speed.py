"""How fast: ratios to peers or to a baseline, every measurement, and how latencies are spread."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fastres.report.documents import Bench
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
from fastres.report.numbers import number, short, times, times_cell
from fastres.report.panels import Panel, numbered, panel
from fastres.report.plotting import (
    INK,
    MUTED,
    PAPER,
    chart,
    colour,
    legend,
    linear_or_log,
    marker,
)
from fastres.report.records import Comparison, Interval, Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rated = tuple[str, int, Interval]  # whose ratio, at which batch size


def peer_charts(benches: Mapping[str, Bench]) -> Html:
    """How many times as fast as each of its peers ours is, with intervals."""
    drawn, colours = [], _colours(benches)
    for name, bench in benches.items():
        groups: dict[tuple[str, str], list[Rated]] = {}
        for found in bench.ratios:
            if found.speed is not None and known(found.speed):
                group = groups.setdefault((found.model, found.precision), [])
                group.append((found.runtime, found.batch_size, found.speed))
        for (model, precision), group in groups.items():
            title = _title(called(name, benches), model, precision)
            lanes = panel(title, [(peer, size) for peer, size, _ in group], colours)
            head = f"Speed of fastres over its peers, {title}"
            drawn.append(_ratio_chart(lanes, group, head, "times as fast as the peer"))
    return figures(drawn)


def ratio_charts(benches: Mapping[str, Bench]) -> Html:
    """How many times as fast as the baseline each target is, in documents without peers' ratios."""
    drawn = []
    for name, bench in benches.items():
        if bench.ratios:
            continue
        shown = [m for m in bench.measurements if m.target != bench.baseline and rated(m)]
        for lanes, group in _panels(called(name, benches), bench, shown, _colours(benches)):
            ratios = [(m.target, m.batch_size, m.speedup) for m in group if m.speedup]
            head = f"Speed over {bench.baseline} of {lanes.title}"
            named = replace(lanes, title=f"{lanes.title}, over {bench.baseline}")
            drawn.append(_ratio_chart(named, ratios, head, "times as fast as the baseline"))
    return figures(drawn)


def latency_charts(benches: Mapping[str, Bench]) -> Html:
    """How the latencies of single calls are spread."""
    return figures(
        [
            _latency_chart(lanes, group)
            for name, bench in benches.items()
            for lanes, group in _panels(
                called(name, benches),
                bench,
                [m for m in bench.measurements if _spread(m)],
                _colours(benches),
            )
        ]
    )


def measurement_tables(benches: Mapping[str, Bench]) -> Html:
    """All figures of every document, and what was left out."""
    parts = []
    for name, bench in benches.items():
        if bench.measurements:
            parts.append(_measurement_table(name, bench))
        if bench.left_out:
            parts.append(items(f"Left out: {what}: {why}" for what, why in bench.left_out.items()))
    return join(parts)


def change_tables(benches: Mapping[str, Bench]) -> Html:
    """How speeds changed since an earlier run."""
    return join(
        _change_table(name, bench.comparison)
        for name, bench in benches.items()
        if bench.comparison is not None and bench.comparison.rows
    )


def called(name: str, benches: Mapping[str, Bench]) -> str:
    """What heads a figure or a table of one document: nothing where there is only one."""
    return f"{name}: " if len(benches) > 1 else ""


def rated(measurement: Measurement) -> bool:
    """Whether there is a ratio to show."""
    return measurement.speedup is not None and known(measurement.speedup)


def known(ratio: Interval) -> bool:
    """Whether it has all its numbers."""
    return None not in (ratio.median, ratio.low, ratio.high)


def _colours(benches: Mapping[str, Bench]) -> dict[str, int]:
    """Of every runtime on the page, and so of every target, however a document calls it."""
    runtimes = {
        m.target: bench.runtime_of(m.target)
        for bench in benches.values()
        for m in bench.measurements
    }
    peers = (pair.runtime for bench in benches.values() for pair in bench.ratios)
    found = numbered([*runtimes.values(), *peers])
    return found | {target: found[runtime] for target, runtime in runtimes.items()}


def _panels(
    head: str, bench: Bench, shown: Sequence[Measurement], colours: Mapping[str, int]
) -> Iterator[tuple[Panel, Sequence[Measurement]]]:
    """A panel for each model and precision, and what it shows."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for m in shown:
        groups.setdefault((bench.model_of(m), m.precision), []).append(m)
    for (model, precision), group in groups.items():
        title = _title(head, model, precision)
        yield panel(title, [(m.target, m.batch_size) for m in group], colours), group


def _title(head: str, model: str, precision: str) -> str:
    return head + (" in ".join(filter(None, (model, precision))) or "everything timed")


def _ratio_chart(lanes: Panel, ratios: Sequence[Rated], head: str, axis: str) -> Html:
    def paint(axes: Axes) -> None:
        axes.axvline(1, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        bounds = [1.0]
        for target, size, ratio in ratios:
            y, i = lanes.lane(target, size), lanes.series[target]
            bounds += draw_interval(axes, ratio, y, i)
        linear_or_log(axes, "x", bounds)
        lanes.frame(axes)
        axes.set_xlabel(axis)

    said = "; ".join(f"batch {size}, {target} {times(ratio)}" for target, size, ratio in ratios)
    drawn = chart(f"{head}, with 95 % intervals: {said}.", lanes.height, paint)
    return figure(drawn, lanes.title, legend(lanes.series))


def draw_interval(axes: Axes, ratio: Interval, y: float, i: int) -> tuple[float, float]:
    """A known ratio of the i-th series at a height; its ends."""
    low, median, high = ratio.low, ratio.median, ratio.high
    assert low is not None and median is not None and high is not None
    axes.plot([low, high], [y, y], color=colour(i), linewidth=2.2)
    axes.plot([median], [y], marker(i), color=colour(i), markersize=6.5)
    return low, high


def _latency_chart(lanes: Panel, measurements: Sequence[Measurement]) -> Html:
    def paint(axes: Axes) -> None:
        seen: list[float] = []
        for m in measurements:
            y, i = lanes.lane(m.target, m.batch_size), lanes.series[m.target]
            p5, p25, p50, p75, p95, p99, most = _quantiles(m, (5, 25, 50, 75, 95, 99, 100))
            axes.plot([p5, p95], [y, y], color=colour(i), linewidth=1.6)
            axes.plot([p25, p75], [y, y], color=colour(i), linewidth=8, solid_capstyle="butt")
            axes.plot([p50], [y], "|", color=PAPER, markersize=9, markeredgewidth=2)
            axes.plot([p99], [y], marker(i), color=colour(i), markersize=4.5)
            axes.plot([most], [y], "|", color=INK, markersize=7, markeredgewidth=1.4)
            seen += [p5, most]
        linear_or_log(axes, "x", seen)
        lanes.frame(axes)
        axes.set_xlabel("ms for one call")

    said = "; ".join(
        "batch {}, {}: median {}, 99th percentile {}, longest {}".format(
            m.batch_size,
            m.target,
            *(short(q, "ms") for q in _quantiles(m, (50, 99, 100))),
        )
        for m in measurements
    )
    alt = f"Latencies of {lanes.title}: {said}."
    drawn = chart(alt, lanes.height, paint)
    return figure(drawn, lanes.title, legend(lanes.series))


def _spread(measurement: Measurement) -> bool:
    quantiles = measurement.quantiles_ms
    return len(quantiles) > 1 and None not in quantiles


def _quantiles(measurement: Measurement, percentiles: Sequence[int]) -> list[float]:
    last = len(measurement.quantiles_ms) - 1
    found = (measurement.quantiles_ms[round(p * last / 100)] for p in percentiles)
    return [value for value in found if value is not None]


def _measurement_table(name: str, bench: Bench) -> Html:
    percentiles = list(dict.fromkeys(p for m in bench.measurements for p in m.latency_ms))
    ran = any(m.ran for m in bench.measurements)
    over = f"speed over {bench.baseline}" if bench.baseline and not bench.ratios else "speed"
    numeric = ["batch", "img/s", "fastres over it" if bench.ratios else "speed"]
    numeric += [*(f"{p} ms" for p in percentiles), "min ms", "calls"]
    columns = [Column("target"), *(Column(heading, numeric=True) for heading in numeric)]
    columns += [Column("precision")] + [Column("ran in")] * ran
    columns += [Column("backend")] * bool(bench.backends) + [Column("model")]
    rows: list[Sequence[Cell]] = [
        (
            m.target,
            number(m.batch_size),
            number(m.throughput, ",.1f"),
            _speed_cell(bench, m),
            *(number(m.latency_ms.get(p), ",.2f") for p in percentiles),
            number(m.min_ms, ",.2f"),
            number(m.samples, ","),
            m.precision,
            *([m.ran or NOTHING] * ran),
            *([bench.backends.get(m.target, NOTHING)] * bool(bench.backends)),
            bench.model_of(m),
        )
        for m in bench.measurements
    ]
    caption = (
        f"{name}: latency of one call, and images per second of all timed calls; {over} with its "
        "95 % interval"
    )
    return table(caption, columns, rows)


def _speed_cell(bench: Bench, m: Measurement) -> Number:
    """Of a peer, how many times as fast ours is; in documents without ratios, over the baseline."""
    if bench.ratios:
        found = (
            r.speed for r in bench.ratios if (r.peer, r.batch_size) == (m.target, m.batch_size)
        )
        return times_cell(next(found, None))
    return Number(1.0, "1×") if m.target == bench.baseline else times_cell(m.speedup)


def _change_table(name: str, comparison: Comparison) -> Html:
    columns = [Column("target"), Column("model"), Column("precision"), Column("batch", True)]
    columns += [Column("measured by"), Column("speed now over then", True), Column("verdict")]
    rows = [
        (
            row.target,
            row.model,
            row.precision,
            number(row.batch_size),
            row.yardstick,
            times_cell(row.change),
            tag("span", row.verdict, class_=_MOODS.get(row.verdict)),
        )
        for row in comparison.rows
    ]
    limit = (
        f"; changes within {100 * comparison.limit:g} % count as none" if comparison.limit else ""
    )
    shown = table(f"{name} against {comparison.base}{limit}", columns, rows)
    return join([shown, items(comparison.notes)]) if comparison.notes else shown


_MOODS = {"slower": "bad", "faster": "good"}
