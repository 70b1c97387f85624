"""What reports look like as text: tables without colours, JSON, and bars for long work.

Rich is imported where something is shown: an engine runs, and its tests run, without it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from fastres.wording import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, moved by calling what this yields with how many of how many are done.

    Without a terminal, or where a display of the caller's is live already, there is none.
    """
    from rich.console import Console
    from rich.errors import LiveError
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_interactive)
    task = bar.add_task(what, total=None)
    try:
        bar.start()
    except LiveError:
        yield lambda done, total: None
        return
    try:
        yield lambda done, total: bar.update(task, completed=done, total=total)
    finally:
        bar.stop()


def empty_table(*columns: str, title: str | None = None, **options: Any) -> Table:
    """A table of rich's, to be filled row by row and given to `render`."""
    from rich.table import Table

    return Table(*columns, title=title, **options)


def render(renderable: RenderableType, width: int = 120) -> str:
    """The text of a table without colours, trailing blanks stripped."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    text = printable(console.file.getvalue())
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def render_whole(table: Table) -> str:
    """The same as wide as it takes to cut nothing off: a figure without its end is another one."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=10_000)
    return render(table, width=max(80, Measurement.get(console, console.options, table).maximum))


def json_text(value: Any) -> str:
    """Indented JSON; a number that is NaN or infinite is null."""
    try:
        data = msgspec.json.encode(value)
    except UnicodeEncodeError:  # the name of a file, which need not be text
        data = msgspec.json.encode(_printable(msgspec.to_builtins(value)))
    return msgspec.json.format(data, indent=2).decode()


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_printable(k): _printable(v) for k, v in value.items()}
    return [_printable(v) for v in value] if isinstance(value, list | tuple) else value
