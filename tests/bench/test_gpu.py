"""bench/gpu.py without a GPU: its sections run, are kept, go on where they were, and can fail."""

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
from gpu_bench import interrupted

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.py"
SMALL = ("--device=cpu", "--nets=cifar_resnet:8", "--image-size=32", "--batch-sizes=1")


def run(out: Path, *flags: str, interpret: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), f"--out={out}", *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


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
    assert rows(tmp_path)[0]["right"] is False


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


def test_time_that_is_up_is_said(tmp_path: Path) -> None:
    done = run(tmp_path, *SMALL, "--section=parity", "--until=0")
    assert done.returncode == 0 and rows(tmp_path)[0]["error"] == "out of time"


def test_wrong_use(tmp_path: Path) -> None:
    unknown = run(tmp_path, "--only=speeed")
    assert unknown.returncode == 2 and "the sections are facts, compile, parity" in unknown.stderr
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
    done = run(tmp_path, *SMALL, "--only=power", "--budget=200")
    assert done.returncode == 0, done.stderr
    first, second = rows(tmp_path)
    assert (first["name"], second["name"]) == ("fp16 batch 1", "int8 batch 1")
    for row in (first, second):
        assert row["watts"] == 250
        assert row["images_per_joule"] == pytest.approx(row["images_per_second"] / 250)


def test_a_command_whose_time_is_up_is_interrupted() -> None:
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('kept'); exit(130)"
    assert interrupted([sys.executable, "-c", code], 1.0) == (130, "kept\n")
    assert interrupted([sys.executable, "-c", "print('done')"], 30.0) == (0, "done\n")


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
    import gpu_pytest

    source = BENCHMARKS.format(count=count, seconds=seconds, wrong=wrong)
    (tmp_path / "test_kernels.py").write_text(source)
    (tmp_path / "conftest.py").write_text(OPTION)
    monkeypatch.setattr(gpu_pytest, "_BENCH", tmp_path)
    asked = SimpleNamespace(
        device=torch.device("cuda"), out=tmp_path, until=time.time() + (5 if kept is None else 60)
    )
    (row,) = gpu_pytest.kernels(asked)
    assert row["right"] is right, row
    assert row["out_of_time"] == (kept is None)
    assert row["kernels"] == kept if kept else 1 <= row["kernels"] < count
    line = row["table"].strip()
    assert line.startswith(f"boxes batch 32 fp16: {row['kernels']} kernels, ")
    if kept == 3:
        assert "9.0 us in all, 25% to 75% of the roofline, at most 200 TFLOP/s and 10 GB/s" in line
