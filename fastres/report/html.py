"""HTML by construction: text is escaped unless it is `Html` already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from fastres.wording import printable

_EMPTY = ("meta", "link", "br")  # elements without an end
NOTHING = "–"


class Html(str):
    """Markup that goes into a page as it is."""


@dataclass(frozen=True)
class Number:
    """A cell that sorts by its value, whatever its text; a value of None sorts last."""

    value: float | None
    text: str


@dataclass(frozen=True)
class Column:
    """A column of a table; numbers stand to the right, sentences are broken into lines."""

    heading: str
    numeric: bool = False
    wraps: bool = False

    @property
    def class_(self) -> str | None:
        return "number" if self.numeric else "wraps" if self.wraps else None


Cell = str | Number


def text(value: str) -> Html:
    """The text with what would be markup escaped, and what would be invisible made visible."""
    return value if isinstance(value, Html) else Html(escape(printable(value)))


def shortened(words: str, letters: int) -> str:
    """At most so many letters, the last an ellipsis where some were left out."""
    return words if len(words) <= letters else words[: letters - 1] + "…"


def join(parts: Iterable[str], between: str = "") -> Html:
    """All parts in a row, those that are text escaped."""
    return Html(between.join(map(text, parts)))


def tag(element: str, /, *children: str, **attributes: str | None) -> Html:
    """One element. `class_` and `aria_label` mean class and aria-label; None leaves one out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    end = "" if element in _EMPTY else f"</{element}>"
    return Html(f"<{element}{given}>{join(children)}{end}")


def paragraphs(lines: Iterable[str]) -> Html:
    return join(tag("p", line) for line in lines)


def items(lines: Iterable[str], class_: str | None = None) -> Html:
    """A list with bullets; nothing where there are no lines."""
    listed = join(tag("li", line) for line in lines)
    return tag("ul", listed, class_=class_) if listed else Html("")


def table(caption: str, columns: Sequence[Column], rows: Iterable[Sequence[Cell]]) -> Html:
    """A table that sorts by any column and scrolls within itself where it is too wide.

    Args:
        caption: what it shows.
        rows: as many cells as there are columns; the first names the row.
    """
    head = join(_heading(column) for column in columns)
    body = join(
        tag("tr", join(_cell(i, *pair) for i, pair in enumerate(zip(columns, row, strict=True))))
        for row in rows
    )
    inner = join(
        [
            tag("caption", tag("span", caption)),
            tag("thead", tag("tr", head)),
            Html("\n"),
            tag("tbody", body),
        ]
    )
    return tag(
        "div",
        tag("table", inner),
        class_="scroll",
        tabindex="0",  # what scrolls must be reached by the keyboard
        role="region",
        aria_label=caption,
    )


def figure(picture: Html, caption: str, legend: str = "") -> Html:
    """A picture under its caption and over what its colours mean."""
    return tag("figure", tag("figcaption", caption), picture, legend)


def figures(drawn: Sequence[Html], at_once: int = 6) -> Html:
    """Figures side by side where there is room; those past the first few are folded away."""
    if len(drawn) > at_once + 1:
        rest = folded(f"{len(drawn) - at_once} more", figures(drawn[at_once:], len(drawn)))
        return join([figures(drawn[:at_once]), rest])
    return tag("div", join(drawn), class_="charts") if drawn else Html("")


def folded(summary: str, *children: str, unfolded: bool = False) -> Html:
    """What is shown only when it is asked for."""
    return tag("details", tag("summary", summary), *children, open="" if unfolded else None)


def section(title: str, *children: str) -> Html:
    """A part of the page that its contents list."""
    name = anchor(title)
    return tag("section", tag("h2", title, id=name), *children, aria_labelledby=name)


def anchor(title: str) -> str:
    """ "INT8 accuracy" → "int8-accuracy"."""
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


def _heading(column: Column) -> Html:
    button = tag("button", column.heading, type="button")
    return tag("th", button, scope="col", class_=column.class_)


def _cell(position: int, column: Column, cell: Cell) -> Html:
    shown = cell.text if isinstance(cell, Number) else cell
    value = cell.value if isinstance(cell, Number) else None
    return tag(
        "td" if position else "th",
        shown or NOTHING,
        scope=None if position else "row",
        class_=column.class_,
        data_value=None if value is None else repr(value),
    )
