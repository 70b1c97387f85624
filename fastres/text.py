"""What reports look like as text: tables without colours, and JSON."""

from __future__ import annotations

import io
from typing import Any

import msgspec
from rich.console import Console, RenderableType


def render(renderable: RenderableType, width: int = 120) -> str:
    """The text of a table without colours, trailing blanks stripped."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())


def json_text(value: Any) -> str:
    """Indented JSON; a number that is NaN or infinite is null."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
