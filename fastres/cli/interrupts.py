"""Ctrl-C and SIGTERM: an end at once while nothing is to be undone, then an exception.

Imported before anything that takes time, and so imports next to nothing itself.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType

_ENDINGS = (signal.SIGINT, signal.SIGTERM)
_OFTEN, _LONG = 0.02, 5.0  # seconds
_waiting: dict[int, float] = {}  # signals that came during an import, and until when it may last


def end_at_once() -> None:
    """From the first line on: words are read, packages imported, and nothing is to be undone."""
    for one in _ENDINGS:
        signal.signal(one, _end)


def begin() -> None:
    """From now on what was begun is to be undone: a signal raises, but not within an import.

    Half a module is left behind by an exception out of its middle: NumPy's, for one, calls itself
    until the stack is full. So an import ends first, unless the signal comes again, or it takes
    long.
    """
    if signal.getsignal(signal.SIGINT) is _end:  # else this is not a process of its own
        signal.signal(signal.SIGALRM, _look_again)
        for one in _ENDINGS:
            signal.signal(one, _interrupt)


def ignore() -> None:
    """All is done: nothing is left to be undone."""
    if signal.getsignal(signal.SIGINT) in (_end, _interrupt):
        for one in _ENDINGS:
            signal.signal(one, signal.SIG_IGN)


def _end(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        with suppress(OSError):
            os.write(2, b"error: interrupted\n")
    os._exit(128 + number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if number in _waiting or not _is_importing(frame):
        _raise(number)
    _waiting[number] = time.monotonic() + _LONG
    signal.setitimer(signal.ITIMER_REAL, _OFTEN, _OFTEN)


def _look_again(_: int, frame: FrameType | None) -> None:
    for number, until in list(_waiting.items()):
        if signal.getsignal(number) is not _interrupt:  # it is to be ignored by now
            del _waiting[number]
        elif not _is_importing(frame) or time.monotonic() > until:
            _raise(number)
    if not _waiting:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _raise(number: int) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    _waiting.clear()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
