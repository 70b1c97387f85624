"""Where a command's words go: the report to stdout, everything else to stderr."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from itertools import combinations
from pathlib import Path
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from fastres.cli.standard_streams import drop_broken
from fastres.errors import InputError
from fastres.text import json_text
from fastres.version import __version__
from fastres.wording import printable

WORDS: ContextVar[tuple[str, ...]] = ContextVar("words", default=())  # the command was given
_REPORTS: ContextVar[TextIO | None] = ContextVar("reports")  # where they go instead of stdout


@contextmanager
def only_reports() -> Iterator[None]:
    """What models print meanwhile goes to stderr, so that stdout holds the report and no more."""
    before = _REPORTS.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _REPORTS.reset(before)


def emit(
    command: str, text: str, fields: Mapping[str, Any], *, as_json: bool, output: Path | None = None
) -> None:
    """Prints a command's report once, as text or as one JSON document.

    Args:
        command: the subcommand; heads the document, beside fastres's version.
        text: the report for people.
        fields: the report for programs; NaN and infinity become null.
        as_json: which of the two goes to stdout.
        output: a file that takes the JSON document besides.

    Raises:
        InputError: the file cannot be written.
    """
    document = {"command": command, "fastres": __version__, **fields}
    body = json_text(document)
    failure = None
    if output is not None:  # first, since who reads the other may be gone
        try:
            write_file(output, body + "\n")
        except InputError as error:
            failure = error
    typer.echo(body if as_json else printable(text), file=_REPORTS.get(sys.stdout))
    if failure is not None:
        raise failure


def write_file(path: Path, text: str) -> None:
    """
    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


@contextmanager
def one_interrupt() -> Iterator[None]:
    """Lets `interrupted` and `no_more_interrupts` be called within."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted() -> None:
    """Says so at once, and makes further interrupts void: the second would lose what is kept."""
    no_more_interrupts()
    note("interrupted: what was measured is kept")


def no_more_interrupts() -> None:
    """Before results are written, which is short: an interrupt would lose them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_output(output: Path, *read: Path | None) -> None:
    """Keeps a command from writing over what it reads.

    Raises:
        InputError: the output is one of these files.
    """
    for file in filter(None, read):
        if os.path.exists(file) and os.path.exists(output) and output.samefile(file):
            raise InputError(f"{output} is what is read here: give another file to write")


def check_outputs(written: Iterable[Path], read: Iterable[str | Path]) -> None:
    """Keeps a command from writing over what it reads, and one of its files over another.

    Args:
        read: whatever was named, of which some may be files.

    Raises:
        InputError: an output is one of these files, or is given twice.
    """
    outputs = list(written)
    for one, other in combinations(outputs, 2):
        if one.resolve() == other.resolve():
            raise InputError(f"{one} is to be written twice: give two files")
    files = [Path(name) for name in read if os.path.exists(name)]
    for output in outputs:
        check_output(output, *files)


def check_folder(*outputs: Path | None) -> None:
    """Tells before long work, rather than after it, that a file cannot be written.

    Raises:
        InputError: a file's folder is missing, it is a folder itself, or no name for a file.
    """
    for output in filter(None, outputs):
        if not os.path.isdir(output.parent):
            raise InputError(f"{output} cannot be written: there is no folder {output.parent}")
        if os.path.isdir(output):
            raise InputError(f"{output} is a folder; give the file to write")
        try:
            output.lstat()
        except FileNotFoundError:
            pass  # as it should be
        except OSError as error:
            raise InputError(f"{output} cannot be written: {error.strerror}") from error


def make_folder(folder: Path | None) -> None:
    """Tells the same of a folder, which is made if it is missing.

    Raises:
        InputError: it cannot be made, or is no folder.
    """
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made a folder: {error.strerror}") from error


def note(text: str) -> None:
    """Something the user must know, on stderr so that it cannot spoil a report."""
    _say(Text.assemble(("note: ", "yellow"), printable(text)))


def complain(text: str) -> None:
    """An error, in one message on stderr."""
    _say(Text.assemble(("error: ", "bold red"), printable(text)))


@contextmanager
def working(what: str) -> Iterator[None]:
    """Shows a spinner while something takes long: on a terminal, and nowhere else."""
    console = Console(stderr=True)
    if not console.is_interactive:
        yield
        return
    with console.status(Text(what)):
        yield


@contextmanager
def progress(what: str) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, and nowhere else, moved by what this yields: the fraction done."""
    console = Console(stderr=True)
    if not console.is_interactive:
        yield lambda done: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda done: bar.update(task, completed=done)


def command_line() -> list[str]:
    """The words of the command that runs, as they were given."""
    return ["fastres", *WORDS.get()]


def _say(text: Text) -> None:
    """On stderr, if that takes it: where it does not, the exit status says what there is to say."""
    console = Console(stderr=True)
    try:
        with console.capture() as capture:  # rich itself would end the process where nobody reads
            console.print(text, soft_wrap=True)
        sys.stderr.write(capture.get())
        sys.stderr.flush()
    except OSError:
        drop_broken()
