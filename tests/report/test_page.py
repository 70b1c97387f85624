"""fastres.report.page: the skeleton, its colours, and the file."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastres.errors import InputError
from fastres.report.html import Html
from fastres.report.page import page, write_page
from fastres.report.plotting import SERIES, bars, chart, colour, label, legend, linear_or_log

CSS = (Path(__file__).parents[2] / "fastres" / "report" / "page.css").read_text()
COLOURS = {
    name: (light, dark)
    for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", CSS)
}


def test_a_page_is_whole(parsed: Callable[[str], Any]) -> None:
    found = parsed(page("<T>", "s & s", [("One", Html("<p>1</p>")), ("Two", Html(""))]))
    assert found.texts["h1"] == found.texts["title"] == ["<T>"]
    assert found.texts["a"] == ["One", "Two"] == found.texts["h2"]


def test_only_the_script_of_the_page_may_run() -> None:
    html = page("t", "s", [])
    (policy,) = re.findall(r'content="(default-src[^"]*)"', html)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src &#x27;none&#x27;" in policy and f"sha256-{digest}" in policy


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_page(tmp_path / "p.html", Html("×"))
    assert (tmp_path / "p.html").read_text(encoding="utf-8") == "×"
    with pytest.raises(InputError, match=f"{tmp_path} cannot be written"):
        write_page(tmp_path, Html(""))
    assert [path.name for path in tmp_path.iterdir()] == ["p.html"]


PAIRS = [
    *(
        (ink, paper)
        for ink in ("ink", "muted", "accent", "good", "bad")
        for paper in ("paper", "raised")
    ),
    *((f"series-{i + 1}", "paper") for i in range(SERIES)),
]


def _rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _contrast(first: list[float], second: list[float]) -> float:
    """(L1 + 0.05) / (L2 + 0.05) of relative luminances L1 > L2, as WCAG 2 defines them."""
    lights = []
    for rgb in (first, second):
        parts = [c / 255 for c in rgb]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(lights) / min(lights)


@pytest.mark.parametrize(("ink", "paper"), PAIRS)
def test_contrast(ink: str, paper: str) -> None:
    """At least WCAG's AA, in both themes."""
    for theme in (0, 1):
        assert _contrast(_rgb(COLOURS[ink][theme]), _rgb(COLOURS[paper][theme])) >= 4.5


def test_contrast_in_the_hottest_box() -> None:
    for theme in (0, 1):
        heat, raised = (_rgb(COLOURS[name][theme]) for name in ("heat", "raised"))
        box = [0.45 * h + 0.55 * r for h, r in zip(heat, raised, strict=True)]
        assert _contrast(_rgb(COLOURS["ink"][theme]), box) >= 4.5


def test_the_measure_of_contrast_can_fail() -> None:
    assert _contrast(_rgb("#000000"), _rgb("#ffffff")) == pytest.approx(21)
    assert _contrast(_rgb("#777777"), _rgb("#ffffff")) < 4.5


class TestChart:
    def test_takes_its_colours_and_its_font_from_the_page(self) -> None:
        def paint(axes: Any) -> None:
            for i in range(SERIES):
                axes.plot([1, 2], [i, i], color=colour(i))
            axes.set_xlabel("a < b $x$")

        svg = chart("a chart of lines", 200, paint)
        assert not re.search(r"#[0-9a-fA-F]{6}|font-family|xmlns|<style|<metadata", svg)
        assert all(f"var(--series-{i + 1})" in svg for i in range(SERIES))
        assert "a &lt; b $x$</text>" in svg and 'aria-label="a chart of lines"' in svg

    def test_every_variable_is_one_of_the_page(self) -> None:
        svg = chart("a chart of a line", 200, lambda axes: axes.plot([1, 2]))
        used = set(re.findall(r"var\(--([\w-]+)\)", svg + CSS))
        assert used <= set(COLOURS)

    def test_two_charts_share_no_ids(self) -> None:
        def paint(axes: Any) -> None:
            axes.plot([1, 2], "o")

        first, second = (re.findall(r' id="([^"]+)"', chart(alt, 200, paint)) for alt in "ab")
        assert first and not set(first) & set(second)

    def test_the_users_style_does_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import matplotlib

        plain = chart("a", 200, lambda axes: axes.plot([1, 2]))
        monkeypatch.setitem(matplotlib.rcParams, "font.size", 33.0)
        assert chart("a", 200, lambda axes: axes.plot([1, 2])) == plain
        assert matplotlib.rcParams["font.size"] == 33.0

    @pytest.mark.parametrize(
        ("values", "scale"),
        [([1, 2], "linear"), ([1, 20], "log"), ([0, 1], "linear"), ([], "linear")],
    )
    def test_scale(self, values: list[float], scale: str) -> None:
        def paint(axes: Any) -> None:
            axes.plot([1, 2])
            linear_or_log(axes, "y", values)
            assert axes.get_yscale() == scale

        assert "×10" not in chart("a", 200, paint)

    def test_letters_that_no_font_of_matplotlibs_has(self) -> None:
        svg = chart("\x00 模型", 200, lambda axes: axes.set_xlabel(label("\x00 模型")))
        assert svg.count("\\x00 模型") == 2

    def test_bars_differ_by_more_than_colour(self) -> None:
        def paint(axes: Any) -> None:
            for i in range(2):
                bars(axes, [0 + i, 2 + i], [1.0, None], 0.5, i)

        svg = chart("bars of two kinds", 200, paint)
        fills = re.findall(r'style="fill: (var\(--series-\d\)|url\(#h\w+\))"', svg)
        assert fills[0] == "var(--series-1)" and fills[1].startswith("url(#h")
        assert fills[2:] == ["var(--series-2)"] and svg.count("<pattern") == 1  # under the hatch
        assert "#0" not in svg.replace("(#", "")  # what is hatched has the page's colours, too
        found = legend({"a": 0, "b": 1}, barred=True)
        assert found.count("swatch") == 2 and found.count('"swatch hatched"') == 1
        assert ".hatched {" in CSS and not set("●■") & set(found)

    def test_words_that_are_no_text(self) -> None:
        svg = chart("model-\udce9.pt in fp32", 200, lambda axes: axes.plot([1, 2]))
        assert 'aria-label="model-\\udce9.pt in fp32"' in svg
        svg.encode()

    def test_legend(self) -> None:
        found = legend({"<a>": 0, "b": 9})
        assert "&lt;a&gt;" in found and "var(--series-2)" in found
