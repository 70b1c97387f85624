"""How fast: ratios to the baseline, every measurement, and how latencies are spread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastres.report.documents import Bench, Comparison, Measurement
from fastres.report.html import Cell, Column, Html, Number, figure, figures, items, join, table, tag
from fastres.report.numbers import number, short, times, times_cell
from fastres.report.plotting import (
    INK,
    MUTED,
    PAPER,
    chart,
    colour,
    label,
    legend,
    linear_or_log,
    marker,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LANE, _GAP, _FRAME = 17, 0.8, 62  # units for a target, lanes between batches, units for the axis


@dataclass(frozen=True)
class Panel:
    """One model in one precision: measurements that a chart shows together.

    Args:
        series: target → index of its colour, the same in every panel of a document.
    """

    title: str
    baseline: str
    measurements: tuple[Measurement, ...]
    series: dict[str, int]

    @property
    def batches(self) -> list[int]:
        return sorted({m.batch_size for m in self.measurements})

    @property
    def height(self) -> float:
        lanes = len(self.batches) * (len(self.series) + _GAP)
        return _FRAME + _LANE * max(lanes, 2)

    def lane(self, measurement: Measurement) -> float:
        """Where it is drawn, from the top."""
        first = self.batches.index(measurement.batch_size) * (len(self.series) + _GAP)
        return first + list(self.series).index(measurement.target)

    def frame(self, axes: Axes) -> None:
        """Batches from the top, each with its name at the middle of its lanes."""
        step, middle = len(self.series) + _GAP, (len(self.series) - 1) / 2
        names = [f"batch {size}" for size in self.batches]
        axes.set_yticks([i * step + middle for i in range(len(names))], names)
        axes.set_ylim(len(names) * step - _GAP / 2 - 0.5, -0.5 - _GAP / 2)
        axes.grid(visible=False, axis="y")


def ratio_charts(benches: Mapping[str, Bench]) -> Html:
    """How many times as fast as the baseline each target is, with intervals."""
    drawn = [
        _ratio_chart(panel)
        for panel in _panels(benches, lambda bench, m: m.target != bench.baseline and rated(m))
    ]
    return figures(drawn)


def latency_charts(benches: Mapping[str, Bench]) -> Html:
    """How the latencies of single calls are spread."""
    return figures([_latency_chart(panel) for panel in _panels(benches, lambda _, m: _spread(m))])


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
    ratio = measurement.speedup
    return ratio is not None and None not in (ratio.median, ratio.low, ratio.high)


def _panels(
    benches: Mapping[str, Bench], wanted: Callable[[Bench, Measurement], bool]
) -> Iterator[Panel]:
    for name, bench in benches.items():
        colours = {target: i for i, target in enumerate({m.target: 0 for m in bench.measurements})}
        groups: dict[tuple[str, str], list[Measurement]] = {}
        for m in bench.measurements:
            if wanted(bench, m):
                groups.setdefault((bench.model_of(m), m.precision), []).append(m)
        for (model, precision), group in groups.items():
            shown = {m.target for m in group}
            series = {target: i for target, i in colours.items() if target in shown}
            title = " in ".join(filter(None, (model, precision))) or "everything timed"
            head = f"{called(name, benches)}{title}"
            yield Panel(head, bench.baseline, tuple(group), series)


def _ratio_chart(panel: Panel) -> Html:
    def paint(axes: Axes) -> None:
        axes.axvline(1, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        bounds = [1.0]
        for m in panel.measurements:
            assert m.speedup is not None
            y, i = panel.lane(m), panel.series[m.target]
            low, median, high = m.speedup.low, m.speedup.median, m.speedup.high
            assert low is not None and median is not None and high is not None
            axes.plot([low, high], [y, y], color=colour(i), linewidth=2.2)
            axes.plot([median], [y], marker(i), color=colour(i), markersize=6.5)
            bounds += [low, high]
        linear_or_log(axes, "x", bounds)
        panel.frame(axes)
        axes.set_xlabel(f"times as fast as {label(panel.baseline)}")

    said = "; ".join(
        f"batch {m.batch_size}, {m.target} {times(m.speedup)}" for m in panel.measurements
    )
    alt = f"Speed over {panel.baseline} of {panel.title}, with 95 % intervals: {said}."
    drawn = chart(alt, panel.height, paint)
    return figure(drawn, panel.title, legend(panel.series))


def _latency_chart(panel: Panel) -> Html:
    def paint(axes: Axes) -> None:
        seen: list[float] = []
        for m in panel.measurements:
            y, i = panel.lane(m), panel.series[m.target]
            p5, p25, p50, p75, p95, p99, most = _quantiles(m, (5, 25, 50, 75, 95, 99, 100))
            axes.plot([p5, p95], [y, y], color=colour(i), linewidth=1.6)
            axes.plot([p25, p75], [y, y], color=colour(i), linewidth=8, solid_capstyle="butt")
            axes.plot([p50], [y], "|", color=PAPER, markersize=9, markeredgewidth=2)
            axes.plot([p99], [y], marker(i), color=colour(i), markersize=4.5)
            axes.plot([most], [y], "|", color=INK, markersize=7, markeredgewidth=1.4)
            seen += [p5, most]
        linear_or_log(axes, "x", seen)
        panel.frame(axes)
        axes.set_xlabel("ms for one call")

    said = "; ".join(
        "batch {}, {}: median {}, 99th percentile {}, longest {}".format(
            m.batch_size,
            m.target,
            *(short(q, "ms") for q in _quantiles(m, (50, 99, 100))),
        )
        for m in panel.measurements
    )
    alt = f"Latencies of {panel.title}: {said}."
    drawn = chart(alt, panel.height, paint)
    return figure(drawn, panel.title, legend(panel.series))


def _spread(measurement: Measurement) -> bool:
    quantiles = measurement.quantiles_ms
    return len(quantiles) > 1 and None not in quantiles


def _quantiles(measurement: Measurement, percentiles: Sequence[int]) -> list[float]:
    last = len(measurement.quantiles_ms) - 1
    found = (measurement.quantiles_ms[round(p * last / 100)] for p in percentiles)
    return [value for value in found if value is not None]


def _measurement_table(name: str, bench: Bench) -> Html:
    percentiles = list(dict.fromkeys(p for m in bench.measurements for p in m.latency_ms))
    columns = [Column("target"), Column("model"), Column("precision")]
    numeric = ["batch", "img/s", *(f"{p} ms" for p in percentiles), "min ms", "calls"]
    columns += [Column(heading, numeric=True) for heading in numeric]
    columns += [Column(f"speed over {bench.baseline}" if bench.baseline else "speed", numeric=True)]
    rows: list[Sequence[Cell]] = [
        (
            m.target,
            bench.model_of(m),
            m.precision,
            number(m.batch_size),
            number(m.throughput, ",.1f"),
            *(number(m.latency_ms.get(p), ",.2f") for p in percentiles),
            number(m.min_ms, ",.2f"),
            number(m.samples, ","),
            Number(1.0, "1×") if m.target == bench.baseline else times_cell(m.speedup),
        )
        for m in bench.measurements
    ]
    caption = (
        f"{name}: latency of one call, and images per second of all timed calls; speed with its "
        "95 % interval"
    )
    return table(caption, columns, rows)


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
    return table(f"{name} against {comparison.base}{limit}", columns, rows)


_MOODS = {"slower": "bad", "faster": "good"}
