"""Where the time of one run goes: each layer in a table, and against the machine's roofs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fastres.report.documents import Bench
from fastres.report.html import Html, figure, figures, folded, join, tag
from fastres.report.numbers import short
from fastres.report.panels import numbered
from fastres.report.plotting import INK, PAPER, chart, colour, label, legend, linear_or_log, marker
from fastres.report.records import Profile, Rate, Work
from fastres.report.speed import called
from fastres.report.timing import timing_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def roofline_charts(benches: Mapping[str, Bench]) -> Html:
    """One chart for each profile: what its layers reach."""
    works = (w for bench in benches.values() for p in bench.profiles for w in p.rows)
    colours = numbered(work.op or "other" for work in works if placed(work))
    return figures(
        [
            _roofline(called(name, benches), profile, bench.rates, colours)
            for name, bench in benches.items()
            for profile in bench.profiles
            if any(map(placed, profile.rows))
        ]
    )


def layer_tables(benches: Mapping[str, Bench]) -> Html:
    """For each profile its groups, and behind a fold every node."""
    return join(
        _tables(profile, called(name, benches))
        for name, bench in benches.items()
        for profile in bench.profiles
    )


def _tables(profile: Profile, head: str) -> Html:
    """Groups, and behind a fold every node."""
    title = f"{head}{profile.title}"
    groups = [(work, ()) for work in (*profile.groups, profile.total)]
    nodes = [(work, (work.op, work.precision, work.kernel)) for work in profile.rows]
    words = ("operation", "precision", "kernel")
    all_nodes = timing_table(f"{title}: every node, longest first", "node", nodes, words)
    return join(
        [
            tag("h3", title),
            timing_table(f"{title}: time by layer group", "group", groups),
            folded(f"{len(nodes)} nodes of {title}", all_nodes),
        ]
    )


def placed(work: Work) -> bool:
    """Whether it has a place under a roof."""
    return bool(work.flop and work.bytes and work.gflop_per_s)


def roof(rate: Rate | None, left: float, right: float) -> tuple[list[float], list[float]]:
    """What rates allow at most, from one intensity to another; nothing where they are not known."""
    if rate is None or not rate.gflop_per_s or not rate.gb_per_s:
        return [], []
    ridge = rate.gflop_per_s / rate.gb_per_s
    bends = sorted({left, min(max(ridge, left), right), right})
    return bends, [min(rate.gflop_per_s, x * rate.gb_per_s) for x in bends]


def _roofline(
    head: str, profile: Profile, rates: Mapping[str, Rate], colours: Mapping[str, int]
) -> Html:
    title = f"{head}{profile.title}"
    rows = [work for work in profile.rows if placed(work)]
    intensity = {work.name: work.flop / work.bytes for work in rows}
    kinds = {kind: colours[kind] for kind in dict.fromkeys(work.op or "other" for work in rows)}
    ran = dict.fromkeys(work.precision or profile.precision for work in rows)
    roofs = {name: rates[name] for name in ran if name in rates}

    def paint(axes: Axes) -> None:
        left, right = 0.7 * min(intensity.values()), 1.4 * max(intensity.values())
        tops = [work.gflop_per_s for work in rows if work.gflop_per_s]
        for precision, rate in roofs.items():
            bends, most = roof(rate, left, right)
            if bends:
                axes.plot(bends, most, color=INK, linewidth=1.4)
                axes.annotate(
                    label(precision),
                    (right, most[-1]),
                    (0, 3),
                    textcoords="offset points",
                    ha="right",
                    bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.0},
                    zorder=5,
                )
                tops += most
        for work in rows:
            i = kinds[work.op or "other"]
            x, y = intensity[work.name], work.gflop_per_s or 0.0
            axes.plot([x], [y], marker(i), color=colour(i), markersize=5.5, alpha=0.75)
        linear_or_log(axes, "x", intensity.values())
        linear_or_log(axes, "y", tops)
        axes.set_xlabel("flop for each byte moved")
        axes.set_ylabel("GFLOP/s")

    best = max(rows, key=lambda work: work.gflop_per_s or 0)
    limits = "; ".join(
        f"{name} roof {short(rate.gflop_per_s, 'GFLOP/s')} and {short(rate.gb_per_s, 'GB/s')}"
        for name, rate in roofs.items()
    )
    alt = (
        f"Roofline of {title}: {len(rows)} layers between {short(min(intensity.values()))} and "
        f"{short(max(intensity.values()))} flop for each byte; the most is "
        f"{short(best.gflop_per_s, 'GFLOP/s')}, by {best.name}. {limits or 'No roofs are known'}."
    )
    return figure(chart(alt, 300, paint), title, legend(kinds))
