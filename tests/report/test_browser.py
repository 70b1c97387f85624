"""Pages in a real browser: no errors, no requests, tables that sort, a theme that changes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastres
from fastres import models
from fastres.report.network import network_page
from fastres.report.reading import from_memory
from fastres.report.writing import report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BINARY = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BINARY is None, reason="there is no Chromium here to open pages in")
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BINARY, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def files(documents: list[dict[str, Any]], tmp_path: Path) -> dict[str, Path]:
    """A report of everything, and a network."""
    x = torch.rand(1, 3, 32, 32)
    with fastres.compile(models.cifar_resnet(8, seed=0).eval(), x, backend="reference") as engine:
        network = network_page("net", engine, [x], engine.profile(x))
    sources = [from_memory(document, f"{i}.json") for i, document in enumerate(documents)]
    paths = {"report": tmp_path / "report.html", "network": tmp_path / "network.html"}
    paths["report"].write_text(report(sources))
    paths["network"].write_text(network)
    return paths


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """opened(path, width=..., scheme=...): a page; at the end nothing may have gone wrong on it."""
    wrong: list[str] = []
    pages = []

    def open_page(path: Path, width: int = 1200, scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        pages.append(page)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url))
        page.goto(path.as_uri())
        assert wrong.pop(0) == path.as_uri()
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []


@pytest.mark.parametrize("name", ["report", "network"])
@pytest.mark.parametrize("width", [320, 375, 1200])
def test_a_page_does_not_scroll_sideways(
    name: str, width: int, files: dict[str, Path], opened: Open
) -> None:
    page = opened(files[name], width)
    page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if name == "report" and width < 1200:  # the wide tables do, by themselves
        widths = (
            "[...document.querySelectorAll('.scroll')].map((x) => x.scrollWidth > x.clientWidth)"
        )
        assert any(page.evaluate(widths))


def test_text_of_charts_is_readable_on_a_telephone(files: dict[str, Path], opened: Open) -> None:
    page = opened(files["report"], 375)
    heights = page.evaluate(
        "[...document.querySelectorAll('figure text')].map((x) => x.getBoundingClientRect())"
        ".map((box) => Math.min(box.width, box.height) / 1.2)"
    )
    upright = [height for height in heights if height > 0]
    assert len(upright) > 100 and sum(height < 9 for height in upright) < 0.5 * len(upright)


@pytest.mark.parametrize("name", ["report", "network"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_button_changes_the_theme(
    name: str, scheme: str, files: dict[str, Path], opened: Open
) -> None:
    page = opened(files[name], scheme=scheme)

    def colours() -> list[str]:
        style = "getComputedStyle(document.{})"
        text = "querySelector('svg text')"
        return [
            page.evaluate(f"{style.format('body')}.backgroundColor"),
            page.evaluate(f"{style.format('body')}.color"),
            page.evaluate(f"{style.format(text)}.fill"),
        ]

    button = page.get_by_role("button", name="Dark theme")
    assert button.get_attribute("aria-pressed") == str(scheme == "dark").lower()
    before = colours()
    button.click()
    after = colours()
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert button.get_attribute("aria-pressed") == str(scheme == "light").lower()
    button.click()
    assert colours() == before


def test_tables_sort_by_mouse_and_by_keyboard(files: dict[str, Path], opened: Open) -> None:
    page = opened(files["report"])
    table = page.locator("table", has=page.get_by_role("button", name="p99 ms")).first
    heading = table.locator("th[scope=col]", has_text="img/s")

    def shown() -> list[float]:
        column = "(t) => [...t.tBodies[0].rows].map((r) => Number(r.cells[2].dataset.value))"
        return list(table.evaluate(column))

    before = shown()
    heading.get_by_role("button").click()
    assert shown() == sorted(before) != before
    assert heading.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")  # the button has the focus
    assert shown() == sorted(before, reverse=True)
    assert heading.get_attribute("aria-sort") == "descending"
    first = table.locator("th[scope=col]").first
    first.get_by_role("button").click()
    names = table.locator("tbody th").all_inner_texts()
    assert names == sorted(names) and heading.get_attribute("aria-sort") is None


def test_what_is_missing_sorts_last(files: dict[str, Path], opened: Open) -> None:
    page = opened(files["network"])
    table = page.locator("#every-node ~ .scroll table")
    heading = table.locator("th[scope=col]", has_text="GFLOP/s").get_by_role("button")
    for _ in range(2):
        heading.click()
        rates = table.locator("tbody tr td:nth-child(4)").all_inner_texts()
        assert rates[-1] == "–" and rates[0] != "–"
