"""The skeleton of every page: one file that needs nothing else, and cannot load anything else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from fastres.calib.files import write_whole
from fastres.errors import InputError
from fastres.report.html import Html, anchor, items, join, section, tag
from fastres.version import __version__


def page(title: str, subtitle: str, parts: Sequence[tuple[str, Html]]) -> Html:
    """A whole document.

    Args:
        parts: the sections: title and content.
    """
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = join(
        [
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            # no other script runs and nothing is loaded, whatever came in with the results
            tag("meta", http_equiv="Content-Security-Policy", content=policy),
            tag("title", title),
            tag("style", Html(_resource("page.css"))),
        ],
        "\n",
    )
    contents = items(tag("a", name, href=f"#{anchor(name)}") for name, _ in parts)
    toggle = tag("button", "Dark theme", type="button", id="theme", aria_pressed="false")
    body = join(
        [
            tag("header", tag("div", tag("h1", title), tag("p", subtitle)), toggle),
            tag("nav", contents, aria_label="Contents"),
            tag("main", join((section(*part) for part in parts), "\n")),
            tag("footer", tag("p", f"Written by fastres {__version__}.")),
            tag("script", Html(script)),
        ],
        "\n",
    )
    return Html(
        f"<!doctype html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"
    )


def write_page(path: Path, html: Html) -> None:
    """Writes the page whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        write_whole(path, html.encode())
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def _resource(name: str) -> str:
    return (resources.files("fastres.report") / name).read_text(encoding="utf-8")
