"""How often the regression guard is right, by trials of equal and of slowed runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastres.report.documents import GuardTrials
from fastres.report.html import Column, Html, figure, figures, join, table
from fastres.report.numbers import number, short, times
from fastres.report.plotting import MUTED, chart, colour, label, legend, marker
from fastres.report.records import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LANE = 13  # height of a trial, in the units of a chart
_SERIES = {"the same again": 0, "with the slowdown": 1}


def guard_parts(documents: Mapping[str, GuardTrials]) -> Html:
    """A chart of every trial, and a table of how often the guard was right."""
    shown = {name: document for name, document in documents.items() if document.trials}
    drawn = figures([_chart(name, document) for name, document in shown.items()])
    return join([drawn, *(_table(name, document) for name, document in shown.items())])


def _chart(name: str, document: GuardTrials) -> Html:
    limits = [1.0] if document.limit is None else [1.0, 1.0 - document.limit]

    def paint(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        for limit in limits:
            axes.axvline(limit, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        for y, trial in enumerate(document.trials, 1):
            for i, change in enumerate((trial.same, trial.slowed)):
                low, median, high = change.low, change.median, change.high
                if low is not None and median is not None and high is not None:
                    place = y + 0.3 * (i - 0.5)
                    axes.plot([low, high], [place] * 2, color=colour(i), linewidth=2)
                    axes.plot([median], [place], marker(i), color=colour(i), markersize=4.5)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(len(document.trials) + 0.7, 0.3)
        axes.yaxis.grid(False)
        axes.set_xlabel(label("speed over the first run"))
        axes.set_ylabel("trial")

    title = f"{name}: {len(document.trials)} trials"
    said = "; ".join(
        f"{what} {_span([getattr(trial, field) for trial in document.trials])}"
        for what, field in zip(_SERIES, ("same", "slowed"), strict=True)
    )
    height = 70 + _LANE * len(document.trials)
    return figure(chart(f"{title}. Speeds: {said}.", height, paint), title, legend(_SERIES))


def _span(changes: list[Interval]) -> str:
    """From the least to the largest of some speeds."""
    medians = sorted((c for c in changes if c.median is not None), key=lambda c: c.median or 0.0)
    if not medians:
        return "not known"
    return f"from {times(medians[0])} to {times(medians[-1])}"


def _table(name: str, document: GuardTrials) -> Html:
    trials = document.trials
    equal, slowed = (
        Counter(getattr(trial, f"{which}_verdict") for trial in trials)
        for which in ("same", "slowed")
    )
    slowdown = f", slowed by {document.slower} for {document.model}" if document.slower else ""
    seconds = [trial.seconds for trial in trials if trial.seconds is not None]
    longest = f"; a run took {short(max(seconds), 's')} at most" if seconds else ""
    rows = [
        ("equal runs", "called slower", number(document.false_alarms)),
        ("equal runs", "called unclear", number(equal["unclear"])),
        ("equal runs", "all intervals overlap", number(document.agreeing)),
        ("slowed runs", "called slower", number(document.caught)),
        ("slowed runs", "called unclear", number(slowed["unclear"])),
    ]
    caption = f"{name}: of {len(trials)} trials each{slowdown}{longest}"
    columns = [Column("runs"), Column("what"), Column("trials", numeric=True)]
    return table(caption, columns, rows)
