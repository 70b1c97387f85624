"""Targets in processes of their own: pinned, quiet, and told of when they fail."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastres.errors import UnsupportedError
from fastres.timing import processes
from fastres.timing.processes import Process, Stopped

Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Process] = []

    def make(maker: str, **arguments: object) -> Process:
        cores = sorted(os.sched_getaffinity(0))[:1]
        process = Process(maker, f"makers:{maker}", arguments, cores=cores, folder=tmp_path)
        started.append(process)
        return process

    yield make
    for process in started:
        process.close()


def test_is_made_pinned_and_timed(start: Start) -> None:
    process = start("sleeper", seconds=0.01)
    facts = process.wait()
    assert facts["pid"] != os.getpid() and len(facts["cores"]) == 1
    x = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(process.feed(x), 2 * x)
    assert torch.equal(process.feed(x, rows=[0, 2]), 2 * x[[0, 2]])
    assert 0.01 <= process.warm_up(0.02) < 0.2
    seconds = process.turn(3)
    assert len(seconds) == 3 and all(0.01 <= s < 0.2 for s in seconds)


def test_what_it_prints_spoils_nothing(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    process = start("talker")
    process.wait()
    process.feed(torch.ones(2))
    assert process.ask("add", 3) == 5
    assert capfd.readouterr().out == ""


def test_one_that_hangs_is_ended(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LONGEST", 0.3)
    with pytest.raises(Stopped, match="hung stopped: it gave no answer for 0.005 minutes"):
        start("hung").wait()


def test_the_first_of_all_does_not_hear_interrupts_either(tmp_path: Path) -> None:
    """Ctrl-C on a terminal goes to it, too, and it cannot say at once that it ignores it."""
    code = (
        "import sys; from pathlib import Path\n"
        "from fastres.timing.processes import Process\n"
        "if __name__ == '__main__':\n"
        "    one = Process('x', 'makers:masked', {}, cores=[int(sys.argv[1])], folder=Path())\n"
        "    print(one.wait()['blocked'])\n"
        "    one.close()\n"
    )
    (tmp_path / "first.py").write_text(code)
    core = str(min(os.sched_getaffinity(0)))
    done = subprocess.run(
        [sys.executable, "first.py", core],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


def test_what_it_started_ends_with_it(start: Start) -> None:
    process = start("parent", seconds=60)
    child = process.wait()["child"]
    assert _within(10, lambda: _words(child).startswith("sleep"))  # it has begun
    process.kill()
    process.close()
    assert _within(10, lambda: not _words(child))


def _words(process: int) -> str:
    """With which it was started; of one that has ended, nothing."""
    try:
        return Path("/proc", str(process), "cmdline").read_text()
    except OSError:
        return ""


def _within(seconds: float, true: Callable[[], bool]) -> bool:
    until = time.time() + seconds
    while not true() and time.time() < until:
        time.sleep(0.02)
    return true()


def test_ends_tidily_without_a_last_search_for_garbage(start: Start, tmp_path: Path) -> None:
    process = start("leaver", path=tmp_path / "frozen")
    process.wait()
    process.close()
    assert int((tmp_path / "frozen").read_text()) > 1000


def test_errors_come_back(start: Start) -> None:
    with pytest.raises(UnsupportedError, match="not on a Monday"):
        start("refused").wait()
    with pytest.raises(Stopped, match="broken stopped: RuntimeError: it broke"):
        start("broken").wait()
    process = start("no_tensor")
    process.wait()
    with pytest.raises(Stopped, match="it returns dict; a tensor is expected"):
        process.feed(torch.ones(1))
    with pytest.raises(Stopped):
        process.raise_failure()


def test_a_death_is_told_with_its_last_words(start: Start) -> None:
    process = start("mortal", calls=3)
    process.wait()
    process.feed(torch.ones(1))
    said = "its process died, exit status 7; the last it printed: about to end"
    with pytest.raises(Stopped, match=said):
        process.turn(5)
    with pytest.raises(Stopped, match="its process died"):
        process.turn(1)
