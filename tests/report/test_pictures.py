"""Pictures as files of their own: what they show, in which colours, and the committed ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import fastres
from fastres import models
from fastres.errors import InputError
from fastres.report.html import Html, tag
from fastres.report.image import THEMES, image, write_images
from fastres.report.network import network_picture
from fastres.report.pictures import pictures
from fastres.report.reading import from_memory, read

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
DRAWING = tag(
    "svg",
    tag("rect", class_="box", style="fill: color-mix(in srgb, var(--heat) 25%, var(--raised))"),
    tag("text", "a < b", style="fill: var(--ink)"),
    class_="network",
    aria_label="A <box> & more",
    viewBox="0 0 40 20",
)


@pytest.mark.parametrize("theme", THEMES)
def test_an_image_stands_alone(theme: Any) -> None:
    root = ElementTree.fromstring(image(DRAWING, theme))
    assert root.tag == SVG + "svg" and root.attrib["viewBox"] == "0 0 40 20"
    assert (root.attrib["width"], root.attrib["height"]) == ("40", "20")
    assert root.findtext(SVG + "title") == "A <box> & more"
    assert root.findtext(SVG + "text") == "a < b"
    assert "var(" not in image(DRAWING, theme) and "color-mix" not in image(DRAWING, theme)


def test_colours_are_those_of_the_page() -> None:
    css = (ROOT / "fastres" / "report" / "page.css").read_text()
    found = re.search(r"--ink: light-dark\((#\w+), (#\w+)\)", css)
    assert found is not None
    light, dark = (image(DRAWING, theme) for theme in THEMES)
    assert f"fill: {found[1]}" in light and f"fill: {found[2]}" in dark
    assert "fill: #f6e2c4" in light  # a quarter of #f5a524, three of #f6f7f9: c4 is 195.75


def test_files(tmp_path: Path) -> None:
    written = write_images(tmp_path, {"one": DRAWING})
    assert [path.name for path in written] == ["one-light.svg", "one-dark.svg"]
    assert written[1].read_text() == image(DRAWING, "dark")
    with pytest.raises(InputError, match="no pictures can be written there"):
        write_images(tmp_path / "none", {"one": DRAWING})


def test_charts_of_a_document(bench_document: dict[str, Any]) -> None:
    found = pictures([from_memory(bench_document, "run").document])
    said = re.search('aria-label="([^"]*)"', found["peers"])
    assert said is not None
    first = bench_document["ratios"][0]
    same = [r for r in bench_document["ratios"] if r["model"] == first["model"]]
    assert said[1].count(" batch ") == len(same)  # each ratio of the first model is told
    assert found["peers"].count("times as fast as the peer") == len({r["batch_size"] for r in same})
    assert not pictures([])
    del bench_document["ratios"], bench_document["profiles"]
    assert not pictures([from_memory(bench_document, "run").document])


def test_the_committed_charts_show_the_committed_results() -> None:
    drawn = pictures([read(ROOT / "bench" / "results" / "peers.json").document])
    assert sorted(drawn) == ["peers", "roofline"]
    for name, svg in drawn.items():
        said = re.search('aria-label="([^"]*)"', svg)
        for theme in THEMES:
            committed = (ROOT / "docs" / "pictures" / f"{name}-{theme}.svg").read_text()
            assert said is not None and f"<title>{said[1]}</title>" in committed, (
                f"{name}-{theme}.svg is of other results: make pictures"
            )


@pytest.fixture(scope="module")
def drawn() -> Html:
    model, x = models.cifar_resnet(20, seed=0).eval(), torch.rand(1, 3, 32, 32)
    with fastres.compile(model, x, backend="reference") as engine:
        engine(x)
        return network_picture("net", engine, [x], engine.profile(x))


class TestNetwork:
    def test_blocks_that_repeat_are_drawn_once(self, drawn: Html) -> None:
        # 1 + 2 · 9 convolutions, of which 3 blocks of layer1 are one, 2 of layer2 and of layer3
        assert drawn.count(">conv 3×3<") + drawn.count(">conv 3×3 /2<") == 1 + 2 * (9 - 2 - 1 - 1)
        assert re.findall(r">×(\d): ", drawn) == ["3", "2", "2"]
        assert drawn.startswith("<svg ") and ">net: " in drawn

    def test_time_is_that_of_all(self, drawn: Html) -> None:
        whole = re.search(r">net: ([\d.]+) ms in \d+ nodes<", drawn)
        assert whole is not None
        shown = [float(ms) for ms in re.findall(r'text-anchor="end"[^>]*>([\d.]+) ms<', drawn)]
        assert sum(shown) == pytest.approx(float(whole[1]), rel=0.02, abs=0.001 * len(shown))

    def test_nothing_lies_on_something_else(self, drawn: Html) -> None:
        root = ElementTree.fromstring(drawn)
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        places = []
        for group in root.findall("g"):
            right, down = map(float, re.findall(r"[\d.]+", group.attrib["transform"]))
            for box in (r for r in group.iter("rect") if r.attrib["class"].startswith("box")):
                places.append((right + float(box.attrib["x"]), down + float(box.attrib["y"])))
        for i, (x, y) in enumerate(places):
            assert 0 <= x <= width - 166 and 0 <= y <= height - 60
            assert all(abs(x - a) >= 166 or abs(y - b) >= 60 for a, b in places[:i])
