"""Rich renderables as plain text, for `str()` of reports."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def render(renderable: RenderableType, width: int = 120) -> str:
    """The text of a table without colours, trailing blanks stripped."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())
