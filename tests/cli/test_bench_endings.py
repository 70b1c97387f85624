"""fastres bench comes to its end: interrupts keep what was measured, and no process is left."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastres.cli import bench_run

BRIEF = ("--duration=0.02", "--launches=1", "--device=cpu")


def test_an_interrupt_keeps_what_was_measured(small: str, command: list[str]) -> None:
    flags = ("--peers", "none", "--duration", "1.5", "--batch-size", "1,2,4,8,16,32,64,128,256")
    process = subprocess.Popen(
        [*command, "bench", small, *flags, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "takes about" in line:  # the first turn follows
            break
    time.sleep(1.7)
    process.send_signal(signal.SIGINT)
    assert "interrupted: what was measured is kept" in process.stderr.readline()  # at once
    process.send_signal(signal.SIGINT)  # impatience costs nothing
    stdout, _ = process.communicate(timeout=60)
    document = json.loads(stdout)
    assert process.returncode == 130 and document["run"]["finished"] is False
    assert 1 <= len(document["measurements"]) < 9


def test_an_interrupt_while_processes_are_made(small: str, command: list[str]) -> None:
    """At once, and no process is left."""
    flags = ("--peers", "torch_compile,torch_compile_max_autotune", "--json")
    process = subprocess.Popen(
        [*command, "bench", small, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.time() + 60
    while len(list(_running(process.pid))) < 4 and time.time() < until:  # they are being made
        time.sleep(0.1)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    started = time.time()
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and time.time() - started < 10
    document = json.loads(stdout)
    assert document["run"]["finished"] is False and document["left_out"] == {}
    assert "Traceback" not in stderr and "takes about" not in stderr
    assert not _left_after(2, process.pid)


@pytest.mark.parametrize(
    ("at", "status"),
    [
        ("bench_run.Bench._machine", 130),
        ("bench_run.Bench._report", 0),
        ("bench_results.Results.to_dict", 0),
        ("output.write_file", 0),
    ],
)
def test_an_interrupt_after_the_last_turn_loses_nothing(
    small: str, command: list[str], at: str, status: int, tmp_path: Path
) -> None:
    where, _, function = at.rpartition(".")
    code = (
        "import os, signal\n"
        "from fastres.cli import bench_run, bench_results, main, output\n"
        f"before = {at}\n"
        "def interrupted(*given, **more):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return before(*given, **more)\n"
        f"{where}.{function} = interrupted\n"
        "if __name__ == '__main__':\n"
        "    main.main()\n"
    )
    (tmp_path / "late.py").write_text(code)
    given = (*BRIEF, "--peers", "none", "--json", "-o", tmp_path / "out.json")
    done = subprocess.run(
        [command[0], tmp_path / "late.py", "bench", small, *given], capture_output=True, text=True
    )
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    document = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(done.stdout) == document and len(document["measurements"]) == 1
    assert document["run"]["finished"] is (status == 0)


def test_nobody_waits_for_rates_after_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done = []

    class Busy:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def wait(self) -> None:
            raise KeyboardInterrupt

        def kill(self) -> None:
            done.append("killed")

        def close(self) -> None:
            done.append("closed")

    monkeypatch.setattr(bench_run, "Process", Busy)
    bench = SimpleNamespace(device="cpu", threads=1, cores=[0])
    with pytest.raises(KeyboardInterrupt):
        bench_run.Bench._rates(bench, [], tmp_path)  # type: ignore[arg-type]
    assert done == ["killed", "closed"]


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_one_that_is_killed(
    ending: signal.Signals, small: str, command: list[str], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [*command, "bench", small, "--peers", "none", "--duration", "60", "--launches", "1"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "takes about" in line:
            break
    process.send_signal(ending)
    process.communicate(timeout=60)
    assert process.returncode == (143 if ending == signal.SIGTERM else -ending)
    assert not _left_after(20, process.pid)
    left = list(tmp_path.glob("fastres-bench-*"))
    assert bool(left) == (ending == signal.SIGKILL)  # which nobody can answer


def _left_after(seconds: float, session: int) -> list[str]:
    """Processes of the session that still run after so long."""
    until = time.time() + seconds
    while (found := list(_running(session))) and time.time() < until:
        time.sleep(0.1)
    return found


def _running(session: int) -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            name, _, facts = (process / "stat").read_text().rpartition(") ")
            state, _, _, of, *_ = facts.split()
            if int(of) == session and state != "Z":  # which nobody has taken note of yet
                yield name
