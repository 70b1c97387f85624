"""fastres.report.html and numbers: what is text stays text, and cells sort by value."""

from __future__ import annotations

import pytest

from fastres.report.html import (
    Column,
    Html,
    Number,
    anchor,
    figures,
    folded,
    join,
    section,
    table,
    tag,
    text,
)
from fastres.report.numbers import number, percent, short, times
from fastres.report.records import Interval

EVIL = '<script>alert("x")</script>&'


def test_text_is_escaped_once_and_markup_is_not() -> None:
    assert text(EVIL) == "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;"
    assert tag("p", EVIL, tag("b", "&")) == f"<p>{text(EVIL)}<b>&amp;</b></p>"
    assert join(["<", Html("<br>")], ", ") == "&lt;, <br>"


def test_attributes_are_escaped_and_may_be_left_out() -> None:
    found = tag("p", class_="a", aria_label='"<', hidden=None)
    assert found == '<p class="a" aria-label="&quot;&lt;"></p>'
    assert tag("br") == "<br>"


def test_what_would_steer_a_reader_is_shown() -> None:
    assert text("a\x1b[1m\u202eb") == "a\\x1b[1m\\u202eb"


def test_a_table_has_caption_scopes_and_values() -> None:
    found = table(EVIL, [Column("a"), Column("b", numeric=True)], [("x", Number(2.5, "2½"))])
    assert f"<caption><span>{text(EVIL)}</span></caption>" in found
    assert '<th scope="col"><button type="button">a</button></th>' in found
    assert '<th scope="row">x</th><td class="number" data-value="2.5">2½</td>' in found


def test_an_empty_cell_is_a_dash_and_sorts_last() -> None:
    found = table("c", [Column("a"), Column("b", numeric=True)], [("", number(None))])
    assert '<th scope="row">–</th><td class="number">–</td>' in found


def test_a_row_of_another_length_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="zip"):
        table("c", [Column("a")], [("x", "y")])


@pytest.mark.parametrize(("count", "folds"), [(0, 0), (7, 0), (8, 1), (30, 1)])
def test_many_figures_are_folded(count: int, folds: int) -> None:
    found = figures([tag("figure", str(i)) for i in range(count)])
    assert found.count("<details>") == folds and found.count("<figure>") == count


def test_folds_and_sections() -> None:
    assert folded("a", "b", unfolded=True) == '<details open=""><summary>a</summary>b</details>'
    assert anchor("INT8 & accuracy!") == "int8-accuracy"
    assert '<h2 id="a-b">A b</h2>' in section("A b")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0.0, "0"), (0.01234, "0.0123"), (123.4, "123"), (1234567.8, "1,234,568")],
)
def test_short(value: float | None, shown: str) -> None:
    assert short(value) == shown


def test_numbers() -> None:
    assert short(2.0, "ms") == "2 ms"
    assert number(1234.5, ",.1f") == Number(1234.5, "1,234.5")
    assert percent(0.125) == Number(0.125, "12.5 %") and percent(None).value is None
    assert times(Interval(1.3, 1.2, 100.4)) == "1.30× [1.20, 100]"
    assert times(Interval(1.3)) == "1.30×" and times(None) == times(Interval()) == "–"
