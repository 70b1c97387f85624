"""How time grows with the batch, the image, the depth or the threads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastres.report.documents import Scaling, Series
from fastres.report.html import Column, Html, figure, figures, join, table
from fastres.report.numbers import number, percent, short
from fastres.report.plotting import INK, chart, colour, label, linear_or_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def scaling_charts(documents: Mapping[str, Scaling]) -> Html:
    """A chart for each series, and all their fits in a table."""
    named = [
        (f"{name}: " if len(documents) > 1 else "", series)
        for name, document in documents.items()
        for series in document.series
    ]
    drawn = figures([_chart(head, series) for head, series in named if series.points])
    fitted = [(head, series) for head, series in named if series.fit is not None]
    return join([drawn, _table(fitted) if fitted else Html("")])


def _chart(head: str, series: Series) -> Html:
    title = f"{head}{series.target}, by {series.name}"
    known = [(p.x, p.median) for p in series.points if p.median is not None]

    def paint(axes: Axes) -> None:
        if series.fit is not None:
            ends = [min(x for x, _ in known), max(x for x, _ in known)] if known else []
            line = [series.fit.slope * x + series.fit.intercept for x in ends]
            axes.plot(ends, line, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        for point in series.points:
            if point.low is not None and point.high is not None:
                axes.plot([point.x] * 2, [point.low, point.high], color=colour(0), linewidth=2)
        axes.plot([x for x, _ in known], [y for _, y in known], "o", color=colour(0))
        if series.fit is None:  # a straight line would be bent by a logarithmic axis
            linear_or_log(axes, "y", [y for _, y in known])
        else:
            axes.set_ylim(bottom=0)
        linear_or_log(axes, "x", [])
        axes.set_xlabel(label(series.x_label or series.name))
        axes.set_ylabel(label(series.unit))

    said = "; ".join(f"{short(x)}: {short(y, series.unit)}" for x, y in known)
    alt = f"{title}: {said}{_fit(series)}."
    return figure(chart(alt, 260, paint), title)


def _fit(series: Series) -> str:
    if series.fit is None:
        return ""
    fit, what = series.fit, series.x_label or series.name
    grade = "" if fit.r2 is None else f", R² {fit.r2:.3f}"
    grade += "" if fit.worst is None else f", off by {percent(fit.worst).text} at most"
    return f"; dashed: {short(fit.slope)} {series.unit} × {what} + {short(fit.intercept)}{grade}"


def _table(named: list[tuple[str, Series]]) -> Html:
    columns = [Column("target"), Column("by"), Column("slope", True)]
    columns += [Column("intercept", True), Column("R²", True), Column("off at most", True)]
    rows = [
        (
            f"{head}{series.target}",
            series.x_label or series.name,
            number(series.fit.slope),
            number(series.fit.intercept),
            number(series.fit.r2, ".4f"),
            percent(series.fit.worst),
        )
        for head, series in named
        if series.fit is not None
    ]
    return table("Linear fits: time = slope × what grows + intercept", columns, rows)
