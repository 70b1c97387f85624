"""bench.cpu.scaling and bench.cpu.depth run; what they measure here means nothing."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench.cpu import depth, scaling
from bench.cpu.fits import linear_fit
from fastres.errors import OutOfMemory
from fastres.timing.contest import PAUSE


def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "cifar_resnet8", "--precision", "fp32", "--duration", "0.02"]
    arguments += ["--series", "batch,depth_cifar,threads", "--batch-sizes", "1,2,3"]
    arguments += ["--cifar-depths", "8,14,20", "-o", str(tmp_path / "out.json")]
    assert scaling.main(arguments) == 0
    assert "straight line" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    by_name = {series["name"]: series for series in found["series"]}
    assert [p["x"] for p in by_name["batch"]["points"]] == [1, 2, 3]
    deep = by_name["depth of CIFAR nets"]
    assert [p["x"] for p in deep["points"]] == [8, 14, 20]
    assert deep["points"][2]["median"] > deep["points"][0]["median"] > 0
    assert deep["fit"]["slope"] > 0 and by_name["threads"]["fit"] is None
    assert all(p["low"] <= p["median"] <= p["high"] for s in by_name.values() for p in s["points"])
    assert found["run"]["finished"] is True


QUICK = ("--model", "cifar_resnet8", "--precision", "fp32", "--duration", "0.02")


def series(name: str) -> scaling.Series:
    return scaling.Series(name, "a net", "things", "ms", (scaling.Point(1, 2.0, 1.0, 3.0),), None)


def test_each_series_is_written_at_once_and_an_interrupt_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, seen = tmp_path / "out.json", []

    def second(precision: str, given: object) -> scaling.Series:
        seen.append(json.loads(path.read_text()))
        raise KeyboardInterrupt

    monkeypatch.setitem(scaling.SERIES, "batch", lambda *_: series("first"))
    monkeypatch.setitem(scaling.SERIES, "depth", second)
    assert scaling.main([*QUICK, "--series", "batch,depth", "-o", str(path)]) == 130
    found = json.loads(path.read_text())
    assert seen == [found] and found["run"]["finished"] is False
    assert [one["name"] for one in found["series"]] == ["first"]
    printed = capsys.readouterr()
    assert "interrupted: 1 of 2 series are done" in printed.err and "first" in printed.out
    monkeypatch.setitem(scaling.SERIES, "depth", lambda *_: series("second"))
    assert scaling.main([*QUICK, "--series", "batch,depth", "-o", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["run"]["finished"] is True and len(found["series"]) == 2


def test_a_series_that_fails_is_told_in_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(precision: str, given: object) -> scaling.Series:
        raise OutOfMemory("no room; take a smaller batch")

    monkeypatch.setitem(scaling.SERIES, "batch", fails)
    assert scaling.main([*QUICK, "--series", "batch"]) == 2
    told = capsys.readouterr().err
    assert "error: no room; take a smaller batch: 0 of 1 series are done" in told


def test_points_are_timed_on_their_cores_with_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed, seen = os.sched_getaffinity(0), {}

    def timing(contestants: list[Any], *rest: Any, pause_s: float) -> None:
        seen.update(pause=pause_s, cores=os.sched_getaffinity(0))
        rest[-1].update({one.name: [[0.001]] * 8 for one in contestants})

    monkeypatch.setattr(scaling, "interleave", timing)
    monkeypatch.setattr(scaling, "cores", lambda count: sorted(allowed)[:1])
    assert scaling.main([*QUICK, "--series", "batch", "--batch-sizes", "1,2"]) == 0
    assert seen == {"pause": PAUSE, "cores": {min(allowed)}}
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--series colour", "there is no colour; there are batch,"),
        ("--duration 0", "'0': give seconds, more than 0"),
        ("--duration nan", "'nan': give seconds, more than 0"),
        ("--duration inf", "'inf': give seconds, more than 0"),
        ("--depths 20", "there is no fastres:resnet20"),
        ("--cifar-depths 9", "depth must be 6n + 2"),
        ("--model x", "there is no fastres:x"),
        ("--model settle", "there is no fastres:settle"),
        ("--precision foo", "there is no foo; there are fp32,"),
        ("--precision tf32", "tf32"),
        ("--backend foo", "invalid choice: 'foo'"),
        ("--batch-sizes 0", "'0': give numbers of at least 1"),
        ("--image-sizes 9,x", "'9,x': give numbers of at least 1"),
        ("--seed -1", "'-1': give a number of at least 0"),
        ("-o nowhere/out.json", "there is no folder nowhere"),
        ("-o /", "/ is a folder; give the file to write"),
    ],
)
def test_scaling_refuses(
    arguments: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is measured."""
    monkeypatch.setattr(scaling, "measure", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(SystemExit, match="2"):
        scaling.main(arguments.split())
    assert said in capsys.readouterr().err


def test_depth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert depth.main(["--depths", "8,14", "-o", str(tmp_path / "out.json")]) == 0
    assert "ms a layer" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["depth"] for row in found["rows"]] == [8, 14]


def test_linear_fit() -> None:
    line = linear_fit([1, 2, 3], [3, 5, 7])
    assert (line.slope, line.intercept, line.r2) == pytest.approx((2, 1, 1))
    assert line.worst == pytest.approx(0, abs=1e-9)
    assert linear_fit([0, 1, 2, 3], [1, 2, 3, 5]).worst == pytest.approx(0.2)  # 0.8 for 1
    assert linear_fit([1, 2, 3, 4], [1, -1, 1, -1]).r2 < 0.3
