"""bench.gpu without a GPU: its sections run, are kept, go on where they were, and can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.children import ROOT
from bench.gpu import __main__ as gpu
from bench.gpu import quoted, under_pytest
from bench.gpu.quoted import Ended, interrupted
from bench.gpu.run import Run

SMALL = ("--device=cpu", "--nets=cifar_resnet:8", "--image-size=32", "--batch-sizes=1")


def run(out: Path, *flags: str, interpret: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    command = [sys.executable, "-W", "ignore", "-m", "bench.gpu", f"--out={out}", *flags]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300
    )


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


@pytest.mark.interpret
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_sections_are_kept_and_not_run_twice(tmp_path: Path) -> None:
    flags = (*SMALL, "--only=facts,parity,stem", "--precisions=fp16,int8", "--budget=200")
    first = run(tmp_path, *flags)
    assert first.returncode == 0, first.stdout + first.stderr
    found = rows(tmp_path)
    wanted = ["facts", "parity", "parity", "stem", "stem", "stem"]
    assert [row["section"] for row in found] == wanted
    assert found[0]["versions"]["triton"] and "PASSED" in found[1]["report"]
    assert found[2]["name"].endswith("int8") and "PyTorch in 8 bits" in found[2]["report"]
    assert all(row["right"] for row in found[1:])
    again = run(tmp_path, *flags, "--only=facts,parity")
    assert again.returncode == 0 and rows(tmp_path) == found


@pytest.mark.interpret
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_a_wrong_result_is_the_exit_status(tmp_path: Path) -> None:
    """The interpreter cuts bf16 off where a GPU rounds, so parity in bf16 fails there."""
    flags = (*SMALL, "--only=parity", "--precisions=bf16", "--budget=100")
    assert run(tmp_path, *flags).returncode == 1
    found = rows(tmp_path)
    assert found[0]["right"] is False
    again = run(tmp_path, *flags)
    assert again.returncode == 1 and rows(tmp_path) == found
    assert "parity: cifar_resnet:8 v1.5 bf16 is wrong" in again.stdout


@pytest.mark.interpret
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_questions_are_answered_and_not_asked_twice(tmp_path: Path) -> None:
    flags = (*SMALL, "--only=questions", "--budget=400")
    first = run(tmp_path, *flags)
    assert first.returncode == 0, first.stdout + first.stderr
    *answers, table = rows(tmp_path)
    assert all(row["right"] for row in answers)
    of = {row["name"].split(":")[0] for row in answers}
    assert of == {"l2", "launch", "peak", "chain", "layout"}
    assert table["name"] == f"the fastest of {len(answers)} cases"
    assert len(table["table"].splitlines()) == 1 + len({row["group"] for row in answers})
    again = run(tmp_path, *flags)
    assert again.returncode == 0 and rows(tmp_path) == [*answers, table]


def section_of(*names: str, found: dict[str, Any]) -> Any:
    """A section that asks whether it must work a row out, and notes which it did."""

    def rows(run: Any) -> Any:
        for name in names:
            if (yield {"name": name, "asked": True}):
                continue
            found.setdefault("worked out", []).append(name)
            answer = found[name]
            if isinstance(answer, BaseException):
                raise answer
            yield {"name": name, **answer}

    return rows


def working(out: Path, section: str) -> int:
    asked = SimpleNamespace(out=out, until=time.time() + 60)
    asked.keep = lambda *told: gpu.Run.keep(asked, *told)
    return gpu.work(section, asked)


def test_what_is_wrong_stays_so_and_what_is_unfinished_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = {"right": True}, {"right": False}
    found: dict[str, Any] = {"a": right, "b": wrong, "c": {"error": "out of time"}, "d": wrong}
    found["d"] = {**wrong, "error": "1e9 off"}
    monkeypatch.setitem(gpu.SECTIONS, "facts", section_of(*"abcd", found=found))
    assert working(tmp_path, "facts") == 1
    assert found.pop("worked out") == ["a", "b", "c", "d"]
    found |= {"c": right, "d": right}
    assert working(tmp_path, "facts") == 1
    assert found.pop("worked out") == ["c", "d"]  # b is known, and still wrong
    assert working(tmp_path, "facts") == 1 and "worked out" not in found
    kept = [row for row in rows(tmp_path) if row["name"] != "b"]
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    found["b"] = right
    assert working(tmp_path, "facts") == 0
    assert found.pop("worked out") == ["b"]


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("KeyboardInterrupt: of a library"), 130, "interrupted"),
        (RuntimeError("out of luck"), 1, "out of luck"),
    ],
    ids=["interrupt", "interrupt of a library", "failure"],
)
def test_a_section_that_is_broken_off_goes_on(
    raised: BaseException,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[str, Any] = {"a": {"right": True}, "b": raised}
    monkeypatch.setitem(gpu.SECTIONS, "facts", section_of("a", "b", found=found))
    assert working(tmp_path, "facts") == status
    assert rows(tmp_path)[-1]["name"] == "stopped" and said in rows(tmp_path)[-1]["error"]
    with (tmp_path / "gpu.jsonl").open("a") as file:
        file.write('{"section": "facts", "name": "b", "ri')  # killed while it wrote
    found |= {"b": {"right": True}, "worked out": []}
    assert working(tmp_path, "facts") == 0
    assert found["worked out"] == ["b"] and set(gpu.latest(tmp_path, "facts")) >= {"a", "b"}


def test_a_wrong_row_counts_where_no_time_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--out={tmp_path}", *SMALL, "--only=parity,stem", "--budget=5"]
    assert gpu.main(flags) == 0
    row = {"section": "stem", "name": "stem batch 1, folded", "right": False}
    (tmp_path / "gpu.jsonl").write_text(json.dumps(row) + "\n")
    assert gpu.main(flags) == 1
    assert "stem: stem batch 1, folded is wrong" in capsys.readouterr().out


def test_a_section_that_is_interrupted_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(gpu, "_section", lambda command, seconds: asked.append(command[-3]) or 130)
    flags = [f"--out={tmp_path}", *SMALL, "--only=facts,report"]
    assert gpu.main(flags) == 130 and asked == ["facts"]


def test_a_section_whose_gpu_is_lost_goes_on_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {"parity": [gpu.LOST, gpu.LOST, 1], "stem": [gpu.LOST] * 9, "facts": [0]}
    asked: list[str] = []

    def ended(command: list[str], seconds: float) -> int:
        asked.append(command[-3])
        return ends[command[-3]].pop(0)

    monkeypatch.setattr(gpu, "_section", ended)
    flags = [f"--out={tmp_path}", *SMALL, "--only=parity,stem,facts"]
    assert gpu.main(flags) == 1
    assert asked == ["parity"] * 3 + ["stem"] * (1 + gpu.RESTARTS) + ["facts"]
    said = capsys.readouterr().out
    assert said.count("goes on there") == 2 + gpu.RESTARTS and said.count("ends there") == 1


def test_more_time_is_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, float] = {}
    monkeypatch.setattr(gpu, "_section", lambda command, s: asked.update({command[-3]: s}) or 0)
    for budget, longer in ((240, 1), (960, 4)):
        assert gpu.main([f"--out={tmp_path}", *SMALL, "--plan=first", f"--budget={budget}"]) == 0
        assert asked["families"] == pytest.approx(30 * longer + gpu.HUNG_S, abs=1)
        assert asked["tuning"] == pytest.approx(budget + gpu.HUNG_S, abs=2)  # all that is left


def test_a_section_that_hangs_is_interrupted_first(tmp_path: Path) -> None:
    code = "import pathlib, sys, time\ntry: time.sleep(60)\n"
    code += "except KeyboardInterrupt: pathlib.Path(sys.argv[1]).touch()"
    command = [sys.executable, "-c", code, str(tmp_path / "ended")]
    assert gpu._section(command, 2.0) is None
    assert (tmp_path / "ended").exists()
    assert gpu._section([sys.executable, "-c", "exit(3)"], 30.0) == 3


def peers_of(out: Path, seconds: float) -> list[dict[str, Any]]:
    asked = SimpleNamespace(
        out=out,
        until=time.time() + seconds,
        batch_sizes=[1],
        image_size=32,
        device=torch.device("cpu"),
    )
    return [row for row in quoted.peers(asked) if "asked" not in row]


def results(measured: int, finished: bool) -> str:
    found = {"left_out": {}, "run": {"finished": finished}, "measurements": [{}] * measured}
    return json.dumps(found)


@pytest.mark.parametrize(
    ("status", "cut_off", "said"),
    [
        (0, False, {}),
        (0, True, {}),
        (130, True, {"error": "out of time"}),
        (130, False, {"error": "interrupted"}),
        (-9, True, {"error": "out of time"}),
        (-9, False, {"right": False}),
        (1, False, {"right": False}),
    ],
)
def test_a_run_of_peers_that_was_cut_off_is_not_done(
    status: int,
    cut_off: bool,
    said: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ended(command: list[str], seconds: float) -> quoted.Ended:
        assert 170 < seconds <= 180
        Path(command[-1]).write_text(results(3, status == 0))
        return quoted.Ended(status, "words", cut_off)

    monkeypatch.setattr(quoted, "interrupted", ended)
    for row in peers_of(tmp_path, 180 + quoted.SPARE_S):
        assert {key: row[key] for key in ("right", "error") if key in row} == said
        assert (tmp_path / row["file"]).read_text() == results(3, status == 0)


def test_peers_do_not_start_with_too_little_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quoted, "interrupted", lambda *_: pytest.fail("it was started"))
    found = peers_of(tmp_path, quoted.SPARE_S + 50)
    assert [row["name"][9:13] for row in found] == ["v1.5", "v1, "]
    assert all("not started: 50 s left, 60 s needed" in row["error"] for row in found)


def test_peers_begin_with_what_has_nothing_and_keep_what_has_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = {"v1.5": results(2, False), "v1": results(0, False)}

    def ended(command: list[str], seconds: float) -> quoted.Ended:
        Path(command[-1]).write_text(now["v1.5" if "v1.5" in command[-1] else "v1"])
        return quoted.Ended(130, "", True)

    monkeypatch.setattr(quoted, "interrupted", ended)
    (tmp_path / "bench-v1.5.json").write_text(results(3, False))
    assert [row["file"] for row in peers_of(tmp_path, 300)] == ["bench-v1.json", "bench-v1.5.json"]
    assert (tmp_path / "bench-v1.5.json").read_text() == results(3, False)
    now["v1.5"] = results(2, True)
    peers_of(tmp_path, 300)
    assert (tmp_path / "bench-v1.5.json").read_text() == results(2, True)


def test_time_that_is_up_is_said(tmp_path: Path) -> None:
    done = run(tmp_path, *SMALL, "--section=parity", "--until=0")
    assert done.returncode == 0 and rows(tmp_path)[0]["error"] == "out of time"


def test_wrong_use(tmp_path: Path) -> None:
    unknown = run(tmp_path, "--only=speeed")
    assert unknown.returncode == 2 and "the sections are facts, compile, families" in unknown.stderr
    if not os.path.exists("/dev/nvidia0"):
        nowhere = run(tmp_path, interpret=False)
        assert nowhere.returncode == 2 and "there is no CUDA device here" in nowhere.stderr


@pytest.mark.interpret
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_images_per_joule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a card that draws 250 W, as far as nvidia-smi says."""
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\nwhile :; do echo 250.0; echo '[N/A]'; sleep 0.05; done\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(quoted, "WARM_S", 0.1)
    monkeypatch.setattr(quoted, "HEATED_S", 0.5)
    asked = Run(tmp_path, torch.device("cpu"), ["cifar_resnet:8"], ("fp16",), [1], 32, 0.0)
    first, second = (row for row in quoted.power(asked) if "asked" not in row)
    assert (first["name"], second["name"]) == ("fp16 batch 1", "int8 batch 1")
    for row in (first, second):
        assert row["watts"] == 250
        assert row["images_per_joule"] == pytest.approx(row["images_per_second"] / 250)


def test_a_command_whose_time_is_up_is_interrupted() -> None:
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('kept'); exit(130)"
    assert interrupted([sys.executable, "-c", code], 2.0) == Ended(130, "kept\n", True)
    done = interrupted([sys.executable, "-c", "print('done')"], 30.0)
    assert done == Ended(0, "done\n", False)


def test_what_an_interrupted_command_started_does_not_run_on() -> None:
    """A child that heeds no interrupt, and holds the command's output open."""
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    child += "print('deaf', flush=True); time.sleep(60)"
    code = f"import subprocess, sys, time\np = subprocess.Popen([sys.executable, '-c', {child!r}])"
    code += "\nprint(p.pid, flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: exit(130)"
    spare, quoted.SPARE_S = quoted.SPARE_S, 2
    try:
        ended = interrupted([sys.executable, "-c", code], 4.0)
    finally:
        quoted.SPARE_S = spare
    pid, said = ended.said.split()
    assert said == "deaf" and (ended.status, ended.cut_off) == (130, True)
    for _ in range(50):  # until its new parent has buried it
        if not running(int(pid)):
            break
        time.sleep(0.1)
    assert not running(int(pid))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_without_results_there_is_no_report(tmp_path: Path) -> None:
    assert run(tmp_path, *SMALL, "--only=report").returncode == 0
    assert rows(tmp_path)[0]["reason"] == "there are no results of fastres bench"


def test_without_tensorrt_for_a_gpu_it_says_why(tmp_path: Path) -> None:
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("there is a GPU")
    done = run(tmp_path, *SMALL, "--only=tensorrt")
    assert done.returncode == 0, done.stderr
    (row,) = rows(tmp_path)
    assert row["name"] == "not run" and "there is no NVIDIA GPU" in row["reason"]


def test_without_a_gpu_kernels_say_why_they_were_not_timed(tmp_path: Path) -> None:
    done = run(tmp_path, *SMALL, "--only=kernels")
    assert done.returncode == 0, done.stderr
    (row,) = rows(tmp_path)
    assert row["name"] == "not run" and "need an NVIDIA GPU" in row["reason"]


OPTION = "def pytest_addoption(parser):\n    parser.addoption('--tiles-in')\n"
BENCHMARKS = """
import time, pytest

@pytest.mark.parametrize("i", range({count}))
def test_kernel(benchmark, i):
    benchmark.pedantic(time.sleep, ({seconds},), rounds=1)
    assert i != {wrong}
    benchmark.extra_info.update(
        family="boxes", batch_size=32, dtype="fp16", microseconds=2.0 + i,
        share_of_roofline=0.25 + i / 4, tflops=100.0 * i, gbs=10.0,
    )
"""


@pytest.mark.parametrize(
    ("count", "seconds", "wrong", "right", "kept"),
    [
        (3, 0.0, -1, True, 3),
        (3, 0.0, 1, False, 2),
        (9, 1.5, -1, True, None),
        (9, 1.5, 1, False, None),
    ],
    ids=["all", "a failure", "out of time", "a failure and out of time"],
)
def test_kernels_are_summed_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    seconds: float,
    wrong: int,
    right: bool,
    kept: int | None,
) -> None:
    """The section itself over other benchmarks, which take no GPU."""
    source = BENCHMARKS.format(count=count, seconds=seconds, wrong=wrong)
    benchmarks = tmp_path / "test_speed.py"
    benchmarks.write_text(source)
    (tmp_path / "conftest.py").write_text(OPTION)
    monkeypatch.setattr(under_pytest, "_BENCHMARKS", benchmarks)
    asked = SimpleNamespace(
        device=torch.device("cuda"), out=tmp_path, until=time.time() + (5 if kept is None else 60)
    )
    _, row = under_pytest.kernels(asked)
    assert row["right"] is right, row
    assert row["out_of_time"] == (kept is None) == ("error" in row)
    assert row["kernels"] == kept if kept else 1 <= row["kernels"] < count
    line = row["table"].strip()
    assert line.startswith(f"boxes batch 32 fp16: {row['kernels']} kernels, ")
    if kept is None and right:  # the rest, and those that are known are not timed again
        asked.until = time.time() + 120
        _, rest = under_pytest.kernels(asked)
        assert (rest["right"], rest["kernels"], "error" in rest) == (True, count, False)
        assert f"{count - row['kernels']} passed, {row['kernels']} deselected" in rest["tail"][-1]
        _, nothing = under_pytest.kernels(asked)
        assert (nothing["right"], nothing["kernels"]) == (True, count)
    if kept == 3:
        assert "9.0 us in all, 25% to 75% of the roofline, at most 200 TFLOP/s and 10 GB/s" in line
