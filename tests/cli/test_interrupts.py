"""Ctrl-C and SIGTERM from the first line on: one line, the documented status, no half import."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A module that is interrupted by itself in the middle of its import, as by somebody's Ctrl-C.
MODULE = """
import os, signal, time
os.kill(os.getpid(), signal.{name})
for _ in range({tenths}):
    time.sleep(0.1)
{again}
whole = True
"""
PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[1])
from fastres.cli import interrupts
interrupts.end_at_once()
{begin}
try:
    import half
    time.sleep(20)
except BaseException as error:
    print(type(error).__name__, getattr(error, "code", ""), hasattr(half, "whole"))
"""


def interrupted(
    folder: Path, name: str, tenths: int = 3, again: str = "", begin: bool = True
) -> tuple[int, str, float]:
    (folder / "half.py").write_text(MODULE.format(name=name, tenths=tenths, again=again))
    program = PROGRAM.format(begin="interrupts.begin()" if begin else "")
    start = time.perf_counter()
    line = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr, time.perf_counter() - start


@pytest.mark.parametrize(
    ("name", "raised"), [("SIGINT", "KeyboardInterrupt  True"), ("SIGTERM", "SystemExit 143 True")]
)
def test_an_import_ends_first(tmp_path: Path, name: str, raised: str) -> None:
    assert interrupted(tmp_path, name)[:2] == (0, f"{raised}\n")


@pytest.mark.parametrize(
    ("name", "status", "said"), [("SIGINT", 130, "error: interrupted\n"), ("SIGTERM", 143, "")]
)
def test_before_a_command_begins_the_end_comes_at_once(
    tmp_path: Path, name: str, status: int, said: str
) -> None:
    assert interrupted(tmp_path, name, tenths=300, begin=False)[:2] == (status, said)


def test_a_second_one_waits_for_nothing(tmp_path: Path) -> None:
    again = "os.kill(os.getpid(), signal.SIGINT); time.sleep(30)"
    status, said, seconds = interrupted(tmp_path, "SIGINT", again=again)
    assert status == 1 and "NameError" in said and "KeyboardInterrupt" in said and seconds < 25


def test_an_import_without_end_is_not_waited_for(tmp_path: Path) -> None:
    status, said, seconds = interrupted(tmp_path, "SIGINT", tenths=300)
    assert status == 1 and "KeyboardInterrupt" in said and 4 < seconds < 25


def test_what_is_to_be_ignored_by_then_is(tmp_path: Path) -> None:
    again = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    (tmp_path / "half.py").write_text(MODULE.format(name="SIGINT", tenths=0, again=again))
    program = PROGRAM.format(begin="interrupts.begin()").replace("sleep(20)", "sleep(0.3)")
    line = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [0.3, 0.6, 1.0, 1.6])
def test_while_packages_are_imported(command: list[str], ending: int, after: float) -> None:
    line = [*command, "compile", "fastres:cifar_resnet8"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(after)
    process.send_signal(ending)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err and "Exception" not in err
    if ending == signal.SIGINT and process.returncode:
        assert process.returncode in (130, -ending) and err == "error: interrupted\n"
    assert process.returncode in (0, 130, 143, -ending), out + err
