"""What PyTorch prints and logs while it exports a model: kept, and shown only where it helps."""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LINE = re.compile(r"# File: (?P<file>\S+?):(?P<line>\d+) in \w+, code: (?P<code>.+)")


class Overheard:
    """The text that one thread would have written to stderr."""

    def __init__(self) -> None:
        self.text = io.StringIO()

    @property
    def last_line(self) -> str:
        """The line of the model that was traced last, as "FILE:LINE `code`"; empty if unknown.

        PyTorch prints the part of the graph that it has when an export fails.
        """
        found = list(_LINE.finditer(self.text.getvalue()))
        return f"{found[-1]['file']}:{found[-1]['line']} `{found[-1]['code']}`" if found else ""


@contextmanager
def overhearing() -> Iterator[Overheard]:
    """Inside, what this thread prints to stderr and what it has PyTorch log are kept back.

    Other threads print as ever. Where logs were asked for by TORCH_LOGS, they are written, too.
    """
    heard = Overheard()
    handlers = _handlers()
    kept = _Kept(heard)
    before = sys.stderr
    sys.stderr = before and _OneThread(before, heard)
    for handler in handlers:
        handler.addFilter(kept)
    try:
        yield heard
    finally:
        for handler in handlers:
            handler.removeFilter(kept)
        sys.stderr = before


def _handlers() -> list[logging.Handler]:
    """Those of all of PyTorch's loggers: many have one of their own, on stderr as it once was."""
    named = dict(logging.root.manager.loggerDict)
    torchs = [log for name, log in named.items() if f"{name}.".startswith("torch.")]
    return [h for log in torchs if isinstance(log, logging.Logger) for h in log.handlers]


class _Kept(logging.Filter):
    """Lets records of other threads pass, and those below a warning, which somebody asked for."""

    def __init__(self, heard: Overheard) -> None:
        super().__init__()
        self._heard, self._thread = heard, threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread or record.levelno < logging.WARNING:
            return True
        self._heard.text.write(f"{record.getMessage()}\n")
        return False


class _OneThread(io.TextIOBase):
    """A stderr that keeps what one thread writes, and hands on all else."""

    def __init__(self, stream: Any, heard: Overheard) -> None:
        self._stream, self._heard, self._thread = stream, heard, threading.get_ident()

    def write(self, text: str) -> int:
        mine = threading.get_ident() == self._thread
        return (self._heard.text if mine else self._stream).write(text)

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
