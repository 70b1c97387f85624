"""The charts of a readme: ours against its peers, and every layer under the machine's roofs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fastres.report.documents import Bench, Document
from fastres.report.html import Html
from fastres.report.layers import placed, roof
from fastres.report.numbers import short, times
from fastres.report.panels import numbered
from fastres.report.plotting import MUTED, chart, colour, linear_or_log, marker
from fastres.report.records import Paired, Profile, Work
from fastres.report.speed import draw_interval, known

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROW, _FRAME, _SPREAD = 34, 92, 0.2  # units for a peer and around all; of a row, between precisions


def pictures(documents: Iterable[Document]) -> dict[str, Html]:
    """Name → chart; none of what the documents do not hold.

    Each shows the first model that there is something to show of, a panel for each batch size and
    a colour for each precision.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    benches = [document for document in documents if isinstance(document, Bench)]
    found: dict[str, Html] = {}
    for bench in benches:
        if ratios := [r for r in bench.ratios if r.speed is not None and known(r.speed)]:
            found.setdefault("peers", _peers([r for r in ratios if r.model == ratios[0].model]))
        if profiles := [p for p in bench.profiles if _placed(p)]:
            same = [p for p in profiles if p.model == profiles[0].model]
            found.setdefault("roofline", _roofline(same, bench))
    return found


def _peers(ratios: Sequence[Paired]) -> Html:
    rows = numbered(ratio.runtime for ratio in ratios)
    colours = numbered(ratio.precision for ratio in ratios)
    sizes = sorted({ratio.batch_size for ratio in ratios})

    def panel(size: int) -> Callable[[Axes], None]:
        def paint(axes: Axes) -> None:
            axes.axvline(1, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
            bounds = [1.0]
            for ratio in ratios:
                if ratio.batch_size != size or ratio.speed is None:
                    continue
                i = colours[ratio.precision]
                y = rows[ratio.runtime] + _SPREAD * (i - (len(colours) - 1) / 2)
                bounds += draw_interval(axes, ratio.speed, y, i)
            linear_or_log(axes, "x", bounds)
            axes.set_yticks(range(len(rows)), list(rows))
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.grid(visible=False, axis="y")
            axes.set_title(f"batch {size}", fontsize=12)
            axes.set_xlabel("times as fast as the peer")
            _legend(axes, colours if size == sizes[0] else {})

        return paint

    said = "; ".join(
        f"{r.runtime} {r.precision} batch {r.batch_size} {times(r.speed)}" for r in ratios
    )
    alt = f"{ratios[0].model}, speed of fastres over its peers, with 95 % intervals: {said}."
    return chart(alt, _FRAME + _ROW * len(rows), *map(panel, sizes))


def _roofline(profiles: Sequence[Profile], bench: Bench) -> Html:
    colours = numbered(profile.precision for profile in profiles)
    sizes = sorted({profile.batch_size for profile in profiles})
    points = {
        (p.precision, p.batch_size): [(w.flop / w.bytes, w.gflop_per_s or 0.0) for w in _placed(p)]
        for p in profiles
    }
    across = [x for found in points.values() for x, _ in found]
    left, right = 0.7 * min(across), 1.4 * max(across)

    def panel(size: int) -> Callable[[Axes], None]:
        def paint(axes: Axes) -> None:
            tops = [y for found in points.values() for _, y in found]
            for precision, i in colours.items():
                bends, most = roof(bench.rates.get(precision), left, right)
                axes.plot(bends, most, color=colour(i), linewidth=1.6)
                tops += most
                for x, y in points.get((precision, size), ()):
                    axes.plot([x], [y], marker(i), color=colour(i), markersize=5, alpha=0.75)
            linear_or_log(axes, "x", across)
            linear_or_log(axes, "y", tops)
            axes.set_title(f"batch {size}", fontsize=12)
            axes.set_xlabel("flop for each byte moved")
            axes.set_ylabel("GFLOP/s" if size == sizes[0] else "")
            _legend(axes, colours if size == sizes[0] else {})

        return paint

    reached = "; ".join(
        f"{p.precision} batch {p.batch_size}: {short(p.total.gflop_per_s, 'GFLOP/s')} over all"
        for p in profiles
    )
    roofs = "; ".join(
        f"{name} {short(rate.gflop_per_s, 'GFLOP/s')} and {short(rate.gb_per_s, 'GB/s')}"
        for name, rate in bench.rates.items()
        if name in colours
    )
    alt = f"{profiles[0].model}, every layer under the machine's roofs. {reached}. Roofs: {roofs}."
    return chart(alt, 330, *map(panel, sizes))


def _legend(axes: Axes, colours: Mapping[str, int]) -> None:
    from matplotlib.lines import Line2D

    keys = [Line2D([], [], color=colour(i), marker=marker(i), label=n) for n, i in colours.items()]
    if keys:
        axes.figure.legend(handles=keys, loc="outside lower left", ncols=len(keys), frameon=False)


def _placed(profile: Profile) -> list[Work]:
    return [work for work in profile.rows if placed(work)]
