"""stdout and stderr that are full, closed or of few letters, and names that no file can have."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.testing import Result

from fastres.cli.standard_streams import make_usable

Run = Callable[..., Result]
LONG = "x" * 300
SUMMARY = ("summary", "fastres:cifar_resnet8")


def ended(command: list[str], redirected: str, **environment: str) -> tuple[int, str]:
    """Status of a command with its streams redirected by a shell, and all that came of it."""
    line = ["bash", "-c", f'"$@" {redirected}', "bash", *command]
    done = subprocess.run(line, capture_output=True, env={**os.environ, **environment}, timeout=120)
    return done.returncode, (done.stdout + done.stderr).decode()


@pytest.mark.parametrize("stream", ["2>/dev/full", "2>&-", "2> >(true)", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("arguments", "status"),
    [(("inspect", "nothing"), 2), (("--nonsense",), 2), (("compile", "a", "--threads", "x"), 2)],
)
def test_an_error_that_cannot_be_told(
    command: list[str], arguments: tuple[str, ...], status: int, stream: str
) -> None:
    assert ended([*command, *arguments], stream) == (status, "")


@pytest.mark.parametrize("stream", ["2>/dev/full", "2>&-"])
def test_a_note_that_cannot_be_told_ends_nothing(command: list[str], stream: str) -> None:
    status, text = ended([*command, *SUMMARY, "--json"], stream)
    assert status == 0 and json.loads(text)["command"] == "summary"


def test_nothing_can_be_told(command: list[str]) -> None:
    assert ended([*command, *SUMMARY], ">/dev/full 2>/dev/full") == (2, "")


ASCII = {
    "PYTHONIOENCODING": {"PYTHONIOENCODING": "ascii"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("how", ASCII)
def test_a_terminal_of_ascii(command: list[str], how: str) -> None:
    status, text = ended([*command, *SUMMARY], "", **ASCII[how])
    assert status == 0 and text.isascii() and "+---" in text and "\\u" not in text
    status, text = ended([*command, "summary", "fastres:schön"], "", **ASCII[how])
    assert status == 2 and text.isascii()
    assert "sch\\u00f6n" in text or "sch\\udcc3" in text  # as the system's encoding has it


@pytest.mark.parametrize("text", ["schön", "日本", "😀", "\udcff", "┏━┳┓│", "plain"])
def test_what_is_escaped_is_json(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    make_usable()
    sys.stdout.write(f'"{text}"')
    sys.stdout.flush()
    found = raw.getvalue().decode("ascii")
    frame = text.startswith("┏")
    assert json.loads(found) == ("+-++|" if frame else text)


@pytest.mark.parametrize(
    "arguments",
    [
        ("summary", LONG),
        ("inspect", LONG),
        ("verify", f"{LONG}:{LONG}"),
        ("compile", "fastres:cifar_resnet8", "-o", LONG),
        ("compile", "fastres:cifar_resnet8", "-o", f"{LONG}/e"),
        ("compile", "fastres:cifar_resnet8", "--weights", LONG),
        ("compile", "fastres:cifar_resnet8", "--calibration", LONG),
        ("export", "fastres:cifar_resnet8", "-o", LONG),
        ("predict", LONG, LONG),
        ("predict", "fastres:cifar_resnet8", LONG),
        ("predict", "fastres:cifar_resnet8", "x.jpg", "--labels", LONG),
        ("calibrate", "fastres:cifar_resnet8", LONG, "-o", "t.json"),
        ("verify", "fastres:cifar_resnet8", "--images", LONG),
        ("verify", "fastres:cifar_resnet8", "-o", LONG),
        ("profile", "fastres:cifar_resnet8", "--html", LONG),
        ("bench", "fastres:cifar_resnet8", "--compare", LONG),
        ("bench", LONG, "--peers", "none"),
        ("report", LONG),
        (*SUMMARY, "-o", LONG),
    ],
)
def test_a_name_that_no_file_can_have(arguments: tuple[str, ...], run: Run) -> None:
    result = run(*arguments, status=2)
    assert result.stderr.splitlines()[-1].startswith(("error: ", "Error: "))
    assert "Traceback" not in result.output
