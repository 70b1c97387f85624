"""bench.cpu.guard_trials keeps each trial at once, and refuses what cannot run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.cpu import guard_trials
from bench.cpu.guard_trials import Trial
from fastres.errors import UnsupportedError
from fastres.report.documents import GuardTrials
from fastres.report.reading import read
from fastres.timing.machine import machine
from fastres.timing.report import BenchReport, measurement
from fastres.timing.statistics import Ratio

SAME, SLOWED = Ratio(1.0, 0.99, 1.01), Ratio(0.9, 0.89, 0.91)
TRIAL = Trial(SAME, "same", SLOWED, "slower", True, 2.0)
TOLD = "called slower by more than 5%: 0 of {0}\ncifar_resnet:68 in its place caught: {0} of"


def trials(*outcomes: Trial | BaseException) -> Callable[..., Trial]:
    left = list(outcomes)

    def next_one(*_: Any) -> Trial:
        outcome = left.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return next_one


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines need not be made where nothing runs them."""
    monkeypatch.setattr(guard_trials, "keep_engine", lambda *_: None)


def test_trials_are_told_and_written(
    given: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(guard_trials, "trial", trials(TRIAL, TRIAL))
    path = tmp_path / "out.json"
    assert guard_trials.main(["--trials", "2", "-o", str(path)]) == 0
    printed = capsys.readouterr()
    assert TOLD.format(2) in printed.out and "at most 2 s a run" in printed.out
    assert "1: same 1x [0.99, 1.01] same, slowed 0.9x [0.89, 0.91] slower, agree" in printed.err
    found = json.loads(path.read_text())
    assert found["run"]["finished"] is True and len(found["trials"]) == 2
    assert found["trials"][0]["slowed"] == {"median": 0.9, "low": 0.89, "high": 0.91}
    shown = read(path).document
    assert isinstance(shown, GuardTrials) and (shown.caught, shown.false_alarms) == (2, 0)


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted: 2 of 9 trials are done"),
        (UnsupportedError("no bf16 here"), 2, "error: no bf16 here: 2 of 9 trials are done"),
    ],
    ids=["interrupt", "failure"],
)
def test_what_breaks_off_keeps_the_trials_before(
    raised: BaseException,
    status: int,
    said: str,
    given: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(guard_trials, "trial", trials(TRIAL, TRIAL, raised))
    path = tmp_path / "out.json"
    assert guard_trials.main(["--trials", "9", "-o", str(path)]) == status
    found = json.loads(path.read_text())
    assert found["run"]["finished"] is False and len(found["trials"]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and TOLD.format(2) in printed.out


def test_a_trial_is_written_before_the_next(
    given: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends it, even what is nobody's interrupt."""
    monkeypatch.setattr(guard_trials, "trial", trials(TRIAL, RuntimeError("a defect")))
    path = tmp_path / "out.json"
    with pytest.raises(RuntimeError, match="a defect"):
        guard_trials.main(["-o", str(path)])
    assert len(json.loads(path.read_text())["trials"]) == 1


def test_an_interrupt_before_the_first_trial_leaves_no_file(
    given: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(guard_trials, "trial", trials(KeyboardInterrupt()))
    assert guard_trials.main(["-o", str(tmp_path / "out.json")]) == 130
    assert "interrupted: 0 of 20 trials are done" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def report(ms: float) -> BenchReport:
    """Of ours, at so many milliseconds a call, beside a peer that takes one."""
    measured = [
        measurement(name, "fp32", 8, [[[seconds / 1e3]] * 8] * 3, (50,), "cifar_resnet:62")
        for name, seconds in {"fastres": ms, "openvino": 1.0}.items()
    ]
    return BenchReport(machine(), "", 0, tuple(measured)).against("openvino")


def test_runs_are_judged_as_fastres_bench_does(
    given: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The document that stands between two runs is one that the guard reads."""
    runs = [report(2.0), report(2.0), report(2.4)]
    monkeypatch.setattr(guard_trials, "run", lambda *_: runs.pop(0))
    monkeypatch.setattr(guard_trials, "_tell", lambda trials, _: found.extend(trials))
    found: list[Trial] = []
    assert guard_trials.main(["--trials", "1"]) == 0
    (one,) = found
    assert (one.same_verdict, one.slowed_verdict, one.agree) == ("same", "slower", True)
    assert one.slowed.median == pytest.approx(2.0 / 2.4)


class WithoutPeers:
    """A contest whose peers could not be made."""

    left_out = {"onnxruntime": "onnxruntime cannot be imported; pip install onnxruntime"}

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> WithoutPeers:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def nothing(self, *_: Any) -> None:
        pass

    prepare = check = time = nothing

    def measurements(self, _: Any) -> tuple[Any, ...]:
        return ()


def test_a_peer_that_cannot_run_is_named(
    given: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard_trials, "Contest", WithoutPeers)
    assert guard_trials.main(["--peers", "openvino,onnxruntime"]) == 3
    told = capsys.readouterr().err
    assert "error: onnxruntime is left out: onnxruntime cannot be imported" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--peers openvino,foo", "--peers: there is no 'foo'; there are eager,"),
        ("--peers tensorrt", "--peers: tensorrt"),
        ("--peers onnxruntime --precision bf16", "onnxruntime runs fp32, int8 here, not bf16"),
        ("--peers openvino,openvino", "give each once"),
        ("--precision foo", "invalid choice: 'foo'"),
        ("--model x", "--model 'x' is no network of fastres.models"),
        ("--slower cifar_resnet:9", "depth must be 6n + 2"),
        ("--trials 0", "--trials must be at least 1"),
        ("--limit 5", "give a fraction above 0 and below 1"),
        ("--duration nan", "give seconds, more than 0"),
        ("-o nowhere/out.json", "there is no folder nowhere"),
    ],
)
def test_wrong_use(
    arguments: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(guard_trials, "keep_engine", lambda *_: pytest.fail("it began"))
    with pytest.raises(SystemExit, match="2"):
        guard_trials.main(arguments.split())
    assert said in capsys.readouterr().err
