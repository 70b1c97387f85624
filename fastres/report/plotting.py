"""Charts by matplotlib as SVG within the page: its colours and its font, the same at every run."""

from __future__ import annotations

import importlib
import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from fastres.errors import BackendUnavailable
from fastres.report.html import Html, items, join, shortened, tag
from fastres.report.numbers import short
from fastres.wording import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 400  # units of a chart; one is a pixel where there is room, and 0.85 on a telephone
SERIES = 8  # colours that the page has
# matplotlib takes no variables of CSS: it draws in these colours, each of which stands for one
INK, MUTED, RULE, PAPER = (f"#01000{i}" for i in range(4))
_COLOURS = tuple(f"#02000{i}" for i in range(SERIES))
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"} | {
    colour: f"series-{i + 1}" for i, colour in enumerate(_COLOURS)
}
_MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼"}  # of matplotlib, of the legend
_HATCHES = ("", "////")  # of bars; in the legend by the page's class "hatched"
_LETTERS = 24
_HIDDEN = ("metadata", "style")
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a model's name may hold a dollar sign
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def colour(i: int) -> str:
    """Of the i-th series."""
    return _COLOURS[i % SERIES]


def marker(i: int) -> str:
    """Of the i-th series: who cannot tell colours apart tells these."""
    return tuple(_MARKERS)[i % len(_MARKERS)]


def label(words: str) -> str:
    """What fits beside an axis or under it; the alternative text and the tables have all of it."""
    return shortened(printable(words), _LETTERS)


def bars(
    axes: Axes, places: Iterable[float], lengths: Iterable[float | None], width: float, i: int
) -> None:
    """Horizontal bars of the i-th series, none where a length is not known."""
    known = [pair for pair in zip(places, lengths, strict=True) if pair[1] is not None]
    axes.barh(
        [place for place, _ in known],
        [length or 0.0 for _, length in known],
        width,
        color=colour(i),
        edgecolor=PAPER,  # of the hatch; without a width there is no edge
        linewidth=0,
        hatch=_HATCHES[i % len(_HATCHES)],
    )


def legend(series: Mapping[str, int], barred: bool = False) -> Html:
    """What the colours and markers of some series mean; wraps where the chart would not.

    Args:
        series: name → index.
        barred: the chart has bars, not markers.
    """
    entries = (join([_key(i, barred), tag("span", name)]) for name, i in series.items())
    return items(entries, class_="legend")


def _key(i: int, barred: bool) -> Html:
    hatched = " hatched" if _HATCHES[i % len(_HATCHES)] else ""
    return tag(
        "span",
        "" if barred else _MARKERS[marker(i)],
        class_=f"swatch{hatched}" if barred else None,
        style=f"color: var(--series-{i % SERIES + 1})",
        aria_hidden="true",
    )


def check_charts() -> None:
    """Tells before anything is drawn, or measured, that it cannot be.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise BackendUnavailable(
            f"charts need matplotlib, which cannot be imported ({error}); "
            "pip install 'fastres[report]'"
        ) from error


def chart(alt: str, height: float, *paints: Callable[[Axes], None]) -> Html:
    """An SVG element.

    Args:
        alt: what the chart shows, in words and with its main numbers. Charts of one page must
            differ in it: the ids within are made of it.
        height: in the units in which each of its panels is WIDTH wide.
        paints: each draws a panel, in the colours of this module; several stand side by side and
            share what goes up.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    check_charts()
    alt = printable(alt)  # the name of a file need not be text, and ids are made of its bytes
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser has other fonts
        matplotlib.rcdefaults()  # whatever the user's own style is
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": alt})
        width = len(paints) * WIDTH
        drawing = Figure(figsize=(width / 72, height / 72), layout="constrained")
        panels = drawing.subplots(1, len(paints), sharey=True, squeeze=False)[0]
        for axes, paint in zip(panels, paints, strict=True):
            axes.tick_params(length=0)
            paint(axes)
        file = io.BytesIO()
        drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), alt)


def linear_or_log(axes: Axes, direction: str, values: Iterable[float]) -> None:
    """A logarithmic axis where the values span more than a factor of 5; readable ticks on both."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    known = [value for value in values if value > 0]
    axis = axes.xaxis if direction == "x" else axes.yaxis
    if known and max(known) > 5 * min(known):
        (axes.set_xscale if direction == "x" else axes.set_yscale)("log")
        wide = max(known) > 60 * min(known)
        axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=7))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def _inline(data: bytes, alt: str) -> Html:
    """The drawing without what it needs only in a file of its own."""
    root = ElementTree.fromstring(data)
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in _HIDDEN:
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.text, element.tail = (element.text or "").strip(), ""
        given = {_local(key): value for key, value in element.attrib.items()}
        element.attrib.clear()
        if given.get("fill", "").startswith("#"):  # of a hatch, in an attribute of its own
            given["style"] = f"fill: {given.pop('fill')}; {given.get('style', '')}".rstrip("; ")
        for key, value in given.items():
            if key != "id" or element.tag != "g":  # nothing refers to the groups
                element.set(key, _themed(value) if key == "style" else value)
    for unwanted in ("width", "height", "version"):
        root.attrib.pop(unwanted, None)
    root.attrib.update({"class": "chart", "role": "img", "aria-label": alt})
    return Html(ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _themed(style: str) -> str:
    """The page's colours and font in place of matplotlib's."""
    style = re.sub(r"font-family: [^;]*;?", "", style)
    return re.sub(r"#[0-9a-f]{6}", lambda found: f"var(--{_VARIABLES.get(found[0], 'ink')})", style)
