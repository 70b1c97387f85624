"""A drawing of a page as a file of its own: SVG in the page's colours, light and dark."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Literal

from fastres.calib.files import write_whole
from fastres.errors import InputError
from fastres.report.html import Html, tag

Theme = Literal["light", "dark"]
THEMES: tuple[Theme, ...] = ("light", "dark")
_FONT = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"
_MIX = re.compile(r"color-mix\(in srgb, (#\w{6}) (\d+)%, (#\w{6})\)")


def write_images(folder: Path, drawn: Mapping[str, Html]) -> list[Path]:
    """Writes each drawing in both themes, `name-light.svg` and `name-dark.svg`.

    Raises:
        InputError: a file cannot be written.
    """
    pairs = [(folder / f"{name}-{t}.svg", image(drawn[name], t)) for name in drawn for t in THEMES]
    try:
        for path, text in pairs:
            write_whole(path, text.encode())
    except OSError as error:
        raise InputError(f"{folder}: no pictures can be written there: {error.strerror}") from error
    return [path for path, _ in pairs]


def image(svg: Html, theme: Theme) -> str:
    """The drawing with the page's rules for it inside, and what it shows as its title."""
    opening = re.match(r"<svg [^>]*>", svg)
    assert opening is not None, "a drawing is one element"
    attributes = dict(re.findall(r'([\w:-]+)="([^"]*)"', opening[0]))
    x, y, width, height = attributes["viewBox"].split()
    head = tag(
        "svg",
        tag("title", Html(attributes["aria-label"])),
        tag("style", Html(_rules())),
        tag("rect", x=x, y=y, width=width, height=height, rx="8", fill="var(--paper)"),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=attributes["viewBox"],
        width=width,
        height=height,
        role="img",
        class_=attributes["class"],
        font_family=_FONT,
        font_size="12",
    )
    colours = _colours(theme)
    whole = head.removesuffix("</svg>") + svg[opening.end() :]
    plain = re.sub(r"var\(--([\w-]+)\)", lambda found: colours[found[1]], whole)
    return _MIX.sub(lambda found: _mixed(found[1], int(found[2]), found[3]), plain) + "\n"


def _css() -> str:
    return (resources.files("fastres.report") / "page.css").read_text(encoding="utf-8")


def _rules() -> str:
    """What the page's style says of the parts of drawings."""
    return "".join(
        line for line in _css().splitlines() if line.startswith((".network .", ".network text"))
    )


def _colours(theme: Theme) -> dict[str, str]:
    """The page's variables, as they are in one theme."""
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\);", _css())
    return {name: dark if theme == "dark" else light for name, light, dark in pairs}


def _mixed(one: str, percent: int, other: str) -> str:
    """As CSS mixes two colours in sRGB."""
    channels = (
        (int(colour[i : i + 2], 16) for colour in (one, other)) for i in range(1, len(one), 2)
    )
    return "#" + "".join(
        f"{round((a * percent + b * (100 - percent)) / 100):02x}" for a, b in channels
    )
