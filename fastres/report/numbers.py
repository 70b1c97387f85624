"""Numbers as people read them; what was not measured is a dash."""

from __future__ import annotations

from fastres.report.html import NOTHING, Number
from fastres.report.records import Interval


def short(value: float | None, unit: str = "") -> str:
    """Three digits, and every digit before the point: 0.0123, 1.23, 1,234."""
    if value is None:
        return NOTHING
    rounded = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{rounded} {unit}" if unit else rounded


def number(value: float | None, form: str = "") -> Number:
    """A cell: by its three digits, or by a format such as ".2f"."""
    if value is None:
        return Number(None, NOTHING)
    return Number(value, format(value, form) if form else short(value))


def percent(share: float | None, form: str = ".1f") -> Number:
    return number(None) if share is None else Number(share, f"{100 * share:{form}} %")


def times(ratio: Interval | None) -> str:
    """1.30× [1.28, 1.33]."""
    if ratio is None or ratio.median is None:
        return NOTHING
    if ratio.low is None or ratio.high is None:
        return f"{_factor(ratio.median)}×"
    return f"{_factor(ratio.median)}× [{_factor(ratio.low)}, {_factor(ratio.high)}]"


def times_cell(ratio: Interval | None) -> Number:
    return Number(None if ratio is None else ratio.median, times(ratio))


def _factor(value: float) -> str:
    """Three digits, zeros at the end too: 1.30."""
    return f"{value:#.3g}".rstrip(".")
