"""Text from elsewhere in our messages: names in files, paths and what others' errors say.

Whoever makes a file chooses the names in it. They may steer a terminal, forge a line of a report,
or fill a screen; what is shown of them does none of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

NAME = 120  # letters of a name that are shown
LINE = 1_200  # of a line of a message
LINES = 400  # of a message
_WORD = re.compile(rf"[^\s\"']{{{LINE // 2},}}")


def printable(text: str) -> str:
    """The text, with escapes in place of what could not be printed or would steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Likewise, and line breaks escaped: a name makes no line of its own."""
    return printable(text).replace("\n", "\\n")


def named(name: object, most: int = NAME) -> str:
    """A name on one line, printable, its middle left out where it is long."""
    text = name if isinstance(name, str) else str(name)
    return one_line(_shortened(text, most))


def listed(names: Iterable[object], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - most} more" if found[most:] else ""
    return ", ".join(named(name) for name in found[:most]) + more


def message(text: str) -> str:
    """What an error says: printable, endless words and lines cut, and not without end itself."""
    lines = text.split("\n", LINES)
    if len(lines) > LINES:
        lines[LINES:] = ["..."]
    return "\n".join(
        _shortened(_WORD.sub(lambda word: _shortened(word[0], LINE // 2), printable(line)), LINE)
        for line in lines
    )


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    head = most * 2 // 3
    return f"{text[:head]}...({len(text)} letters)...{text[head + 30 - most :]}"
