"""Tables of times and rates: of a profile just made, and of one in a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastres.report.html import Cell, Column, Html, table
from fastres.report.numbers import number, percent


class Timed(Protocol):
    """What took time: a row of `fastres.engine.profile.Profile`, or of a document."""

    @property
    def name(self) -> str: ...
    @property
    def milliseconds(self) -> float | None: ...
    @property
    def share(self) -> float | None: ...
    @property
    def gflop_per_s(self) -> float | None: ...
    @property
    def gb_per_s(self) -> float | None: ...
    @property
    def roofline(self) -> float | None: ...


def timing_table(
    caption: str,
    first: str,
    rows: Sequence[tuple[Timed, Sequence[str]]],
    words: Sequence[str] = (),
) -> Html:
    """Name, time, share and rates, then words; the share of the roofline where any is known.

    Args:
        first: what the names are of.
        rows: what took time, and as many words as there are headings for them.
    """
    longest = max((row.milliseconds or 0.0 for row, _ in rows), default=0.0)
    digits = ",.3f" if longest >= 1 else ",.4f"
    known = any(row.roofline for row, _ in rows)
    headings = ("ms", "share", "GFLOP/s", "GB/s", *(("roofline",) if known else ()))
    columns = [Column(first), *(Column(heading, numeric=True) for heading in headings)]
    cells: list[Sequence[Cell]] = [
        (
            row.name,
            number(row.milliseconds or None, digits),
            percent(row.share or None),
            number(row.gflop_per_s or None, ",.1f"),
            number(row.gb_per_s or None, ",.2f"),
            *([percent(row.roofline or None, ".0f")] if known else []),
            *said,
        )
        for row, said in rows
    ]
    return table(caption, [*columns, *map(Column, words)], cells)
