"""Bars of SQNR and of v1 beside v1.5: told apart without colour, and none for what is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import matplotlib.axes
import pytest

from fastres.report.accuracy import sqnr_charts
from fastres.report.documents import Bench, Parities, Settled
from fastres.report.records import Stage, Versions
from fastres.report.versions import version_tables

SETTLED = Parities(
    (
        Settled("net a", "int8", sqnr_db=31.0, median_db=40.0),
        Settled("net b", "fp32", sqnr_db=None, median_db=41.0),
    )
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[float]]]:
    """The lengths of all bars, series by series."""
    lengths: list[list[float]] = []
    barh = matplotlib.axes.Axes.barh

    def spy(self: Any, y: Any, width: Any, *rest: Any, **given: Any) -> Any:
        lengths.append(list(width))
        return barh(self, y, width, *rest, **given)

    monkeypatch.setattr(matplotlib.axes.Axes, "barh", spy)
    yield lengths


def told_apart(html: str) -> bool:
    """Whether one kind of bars is hatched, in the chart and in its legend, and the other is not."""
    plain = re.search(r'style="fill: var\(--series-1\)"', html)
    hatched = re.search(r'style="fill: url\(#h\w+\)"', html)
    keys = re.findall(r'class="(swatch[^"]*)"', html)
    return bool(plain and hatched) and keys == ["swatch", "swatch hatched"]


def test_sqnr(drawn: list[list[float]]) -> None:
    html = sqnr_charts({"p": SETTLED}, {})
    assert told_apart(html)
    assert drawn == [[31.0], [40.0, 41.0]]  # nothing at 0 dB
    assert "net b fp32 logits infinite or not known, middle layer 41 dB" in html
    assert "no bar: infinite or not known" in html


def test_sqnr_of_what_was_timed(drawn: list[list[float]]) -> None:
    html = sqnr_charts({}, {"b": Bench((), sqnr_db={"fp32": None, "int8": 5.5})})
    assert drawn == [[5.5]] and "fp32 logits infinite or not known; int8 logits 5.5 dB" in html
    assert "no bar" not in sqnr_charts({}, {"b": Bench((), sqnr_db={"int8": 5.5})})


def test_sqnr_of_which_nothing_is_known(drawn: list[list[float]]) -> None:
    assert "<svg" in sqnr_charts({}, {"b": Bench((), sqnr_db={"fp32": None})})
    assert drawn == [[]]


def test_versions(drawn: list[list[float]]) -> None:
    groups = (Stage("layer1", 4.0, 5.0), Stage("layer2", None, 6.0))
    pair = Versions("resnet50", "fp32", 1, groups=groups)
    html = version_tables({"b": Bench((), versions=(pair,))})
    assert told_apart(html) and drawn == [[4.0], [5.0, 6.0]]
    assert "layer2 – and 6 ms" in html
