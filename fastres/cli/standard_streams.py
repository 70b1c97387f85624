"""stdout and stderr as they may be: of few letters, full, cut off, or closed."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys


def make_usable() -> None:
    """Closed streams lead nowhere, and whatever letter is written finds a form.

    A file that is opened where stdout was closed would get what libraries print. What an encoding
    lacks is written as escapes, which JSON has, too, and the frames of tables as - and |: so
    `PYTHONIOENCODING=ascii`, and names of files that are no text, end no command.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest number
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)
    codecs.register_error("fastres", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fastres")


def drop_broken() -> None:
    """Lets go of what cannot be written, which would be complained of once more at the exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.write("")  # what is kept as lines is not seen by the other
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_letter, error.object[error.start : error.end])), error.end


def _letter(letter: str) -> str:
    if "\u2500" <= letter <= "\u257f":  # of the frames of tables
        return "-" if letter in "─━" else "|" if letter in "│┃" else "+"
    return json.dumps(letter)[1:-1]
