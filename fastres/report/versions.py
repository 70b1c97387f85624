"""v1 against v1.5: where a bottleneck has its stride, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fastres.report.documents import Bench
from fastres.report.html import Cell, Column, Html, figure, figures, join, table
from fastres.report.numbers import number, short, times_cell
from fastres.report.plotting import bars, chart, label, legend
from fastres.report.records import Versions
from fastres.report.speed import called
from fastres.timing.versions import Difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SERIES = {"v1": 0, "v1.5": 1}
_WIDTH = 0.36  # of a bar


def version_tables(benches: Mapping[str, Bench]) -> Html:
    """A table for each document, then where the time goes, layer group by layer group."""
    compared = {name: bench for name, bench in benches.items() if bench.versions}
    tables = [_table(called(name, benches), bench.versions) for name, bench in compared.items()]
    charts = [
        _chart(called(name, benches), pair)
        for name, bench in compared.items()
        for pair in bench.versions
        if pair.groups
    ]
    return join([*tables, figures(charts)])


def _table(head: str, pairs: tuple[Versions, ...]) -> Html:
    columns = [Column("network"), Column("precision"), Column("batch", True)]
    headings = ("v1 img/s", "v1.5 img/s", "speed v1.5 over v1", "arithmetic", "least time")
    columns += [Column(heading, numeric=True) for heading in headings]
    told = any(stage.difference for pair in pairs for stage in pair.groups)
    columns += [Column("difference by stage, ms", wraps=True)] * told
    rows: list[Sequence[Cell]] = [
        (
            pair.net,
            pair.precision,
            number(pair.batch_size),
            number(pair.v1_img_s, ",.1f"),
            number(pair.v15_img_s, ",.1f"),
            times_cell(pair.ratio),
            number(pair.macs_ratio, ".3f"),
            number(pair.roofline_ratio, ".3f"),
            *([_where(pair)] * told),
        )
        for pair in pairs
    ]
    caption = (
        f"{head}speed with its 95 % interval; arithmetic: multiply-adds of v1.5 over those of v1; "
        "least time: what the machine's rates allow, v1.5 over v1"
        + "; by stage: what v1.5 takes longer, the median of profiles made in turns, least and most"
        * told
    )
    return table(caption, columns, rows)


def _where(pair: Versions) -> str:
    """The stages in which all turns agree on who takes longer, the largest difference first."""
    found = []
    whole = sum(stage.v1_ms or 0.0 for stage in pair.groups)
    for stage in pair.groups:
        span = stage.difference
        if span is None or span.median is None or span.low is None or span.high is None:
            continue
        if Difference(span.median, span.low, span.high).matters(whole):
            text = f"{stage.group} {span.median:+.3g} [{span.low:.3g}, {span.high:.3g}]"
            found.append((abs(span.median), text))
    return ", ".join(text for _, text in sorted(found, reverse=True)) or "no stage for certain"


def _chart(head: str, pair: Versions) -> Html:
    title = f"{head}{pair.net} in {pair.precision}, batch {pair.batch_size}"

    def paint(axes: Axes) -> None:
        for i in _SERIES.values():
            spent = [stage.v1_ms if i == 0 else stage.v15_ms for stage in pair.groups]
            places = [place + (i - 0.5) * _WIDTH * 1.1 for place in range(len(spent))]
            bars(axes, places, spent, _WIDTH, i)
        axes.set_yticks(range(len(pair.groups)), [label(stage.group) for stage in pair.groups])
        axes.set_ylim(len(pair.groups) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("ms")

    said = "; ".join(
        f"{stage.group} {short(stage.v1_ms)} and {short(stage.v15_ms)} ms" for stage in pair.groups
    )
    drawn = chart(
        f"Time by layer group of v1 and v1.5, {title}: {said}.",
        64 + 30 * len(pair.groups),
        paint,
    )
    return figure(drawn, f"{title}: time by layer group", legend(_SERIES, barred=True))
