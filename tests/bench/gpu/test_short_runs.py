"""The short runs of bench.gpu: what they ask, and what can be carried away at any moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.children import environment
from bench.gpu import __main__ as gpu
from bench.gpu import carry as gpu_carry
from bench.gpu import launches, sections
from bench.gpu.families import one_of_each
from bench.gpu.plans import FIRST, PLANS, SECOND
from fastres.backends.triton.planning.table import Tiles
from fastres.kernels.cost import Target

TINY = ("--device=cpu", "--nets=cifar_resnet:8", "--image-size=16", "--batch-sizes=2")


class TestPlans:
    def test_every_section_is_known(self) -> None:
        for plan in PLANS.values():
            assert {asked.section for asked in plan.sections} <= set(gpu.SECTIONS)
        assert {asked.section for asked in PLANS["all"].sections} == set(gpu.SECTIONS)

    def test_they_fit_into_ten_minutes_with_a_start(self) -> None:
        assert FIRST.budget <= 240 and SECOND.budget <= 420
        for plan in (FIRST, SECOND):
            *before, last = plan.sections
            assert last.seconds is None  # what is left is for what takes longest
            assert sum(asked.seconds or 0 for asked in before) < plan.budget

    def test_right_comes_before_fast(self) -> None:
        first = [asked.section for asked in FIRST.sections]
        assert first == ["facts", "compile", "families", "networks", "questions", "tuning"]

    def test_a_section_is_told_what_its_plan_says(self) -> None:
        given = gpu._parser().parse_args(["--plan=first", "--image-size=64"])
        (tuning,) = (asked for asked in FIRST.sections if asked.section == "tuning")
        told = gpu._told(given, tuning)
        assert (told["batch-sizes"], told["precisions"], told["image-size"]) == ("256", "fp16", 64)
        given = gpu._parser().parse_args(["--plan=first", "--batch-sizes=8", "--nets=resnet18"])
        told = gpu._told(given, tuning)
        assert (told["batch-sizes"], told["nets"]) == ("8", "resnet18")


def test_a_case_of_every_kernel_family() -> None:
    cases = one_of_each()
    families = {case.family for case in cases}
    assert families == {
        *("conv2d", "linear", "boxes", "boxes+projection", "split_k", "split_k+last"),
        *("chain", "stem", "stem+pool"),
        *("max_pool", "avg_pool", "global_pool", "elementwise", "fold", "layout"),
    }
    by_number = {(case.family, case.precision) for case in cases}
    for family in ("conv2d", "boxes", "chain", "stem", "stem+pool"):
        assert {(family, "fp16"), (family, "int8"), (family, "fp8")} <= by_number
    strides = {case.problem.shape.stride for case in cases if case.family == "conv2d"}
    assert strides >= {(1, 1), (2, 2)} and len(cases) < 80


def test_the_vendors_form_is_tuned_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """And there only: nothing of it is compiled beforehand."""
    target, known = Target.typical(90), "cuDNN 91900 of PyTorch 2.11.0 on NVIDIA H200"
    run = sections.Run(Path(), torch.device("cpu"), ("resnet50",), ("fp16",), (2,), 64, 0.0)
    monkeypatch.setattr(sections, "tiles_for", lambda *_: Tiles(target, (), known))
    found = [p for p in sections._problems("v1.5", 2, run) if p.kind == "vendor"]
    assert len(found) > 10 and all(p.library == known for p in found)
    (tuning,) = (asked for asked in FIRST.sections if asked.section == "tuning")
    jobs = launches.jobs(gpu.PLANS["first"], target, 64)
    tuned = {job[1] for job in jobs if job[0] == "tile"}
    assert tuned and tuning.precisions == ("fp16",) and not tuned & {*found}
    assert not any(problem.kind == "vendor" for problem in tuned)


class TestCarrying:
    def test_few_small_files_in_order_of_worth(self, tmp_path: Path) -> None:
        out, carry = tmp_path / "out", tmp_path / "carry"
        (out / "triton_cache").mkdir(parents=True)
        (out / "triton_cache" / "kernel.cubin").write_text("large")
        names = [
            "gpu.jsonl",
            "tiles_a.json",
            "kernels.json",
            *(f"bench-{i}.json" for i in range(9)),
        ]
        for name in (*names, "stray.bin"):
            (out / name).write_text(name)
        with gpu_carry.carrying(out, carry):
            pass
        assert sorted(p.name for p in carry.iterdir()) == sorted(names[:8])
        assert all(path.read_text() == path.name for path in carry.iterdir())

    def test_lines_that_are_too_many_lose_the_first(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu_carry, "LARGEST", 100)
        lines = [json.dumps({"row": i}) for i in range(50)]
        (tmp_path / "gpu.jsonl").write_text("\n".join(lines) + "\n")
        with gpu_carry.carrying(tmp_path, tmp_path / "carry"):
            pass
        kept = (tmp_path / "carry" / "gpu.jsonl").read_text().splitlines()
        assert kept == lines[-len(kept) :] and 5 < len(kept) < 10

    def test_while_a_run_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_carry, "EVERY_S", 0.01)
        carry = tmp_path / "carry"
        with gpu_carry.carrying(tmp_path, carry):
            for text in ("one\n", "one\ntwo\n"):
                (tmp_path / "gpu.jsonl").write_text(text)
                until = time.time() + 20
                while not (carry / "gpu.jsonl").exists() or (
                    (carry / "gpu.jsonl").read_text() != text
                ):
                    assert time.time() < until
                    time.sleep(0.01)
        assert [path.name for path in carry.iterdir()] == ["gpu.jsonl"]

    def test_a_run_goes_on_with_what_was_carried_away(self, tmp_path: Path) -> None:
        out, carry = tmp_path / "out", tmp_path / "carry"
        out.mkdir()
        carry.mkdir()
        (carry / "gpu.jsonl").write_text("carried\n")
        (carry / "tiles_a.json").write_text("old")
        (out / "tiles_a.json").write_text("new")
        with gpu_carry.carrying(out, carry):
            assert (out / "gpu.jsonl").read_text() == "carried\n"
        assert (out / "tiles_a.json").read_text() == "new" == (carry / "tiles_a.json").read_text()

    def test_nothing_is_carried_unasked(self, tmp_path: Path) -> None:
        with gpu_carry.carrying(tmp_path, None):
            (tmp_path / "gpu.jsonl").write_text("row\n")
        assert [path.name for path in tmp_path.iterdir()] == ["gpu.jsonl"]


PACK = """
import sys
from pathlib import Path
from bench.gpu.cache import making
from bench.gpu.launches import jobs
from bench.gpu.plans import FIRST
from fastres.kernels.cost import Target
some = [job for job in jobs(FIRST, Target.typical(90)) if "elementwise" in str(job)][:2]
making.make([("some", lambda: iter([k for job in some for k in making.compiled(job)]))],
           Path(sys.argv[1]), 90)
"""


@pytest.mark.interpret
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_the_first_run_in_the_interpreter_from_the_archive_to_the_rows(tmp_path: Path) -> None:
    archive, out, carry = tmp_path / "kernels.tar.xz", tmp_path / "out", tmp_path / "carry"
    here = {**environment(), "TRITON_CACHE_DIR": str(tmp_path / "c")}
    pack = [sys.executable, "-W", "ignore", "-c", PACK, str(archive)]
    made = subprocess.run(
        pack, capture_output=True, text=True, env={**here, "TRITON_INTERPRET": "0"}, timeout=200
    )
    assert made.returncode == 0, made.stderr
    flags = [*TINY, "--plan=first", f"--out={out}", f"--carry={carry}", f"--cache={archive}"]
    command = [sys.executable, "-W", "ignore", "-m", "bench.gpu", *flags, "--budget=2400"]
    del here["TRITON_CACHE_DIR"]
    done = subprocess.run(command, capture_output=True, text=True, env=here, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (carry / "gpu.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert "error" not in row, row
        found.setdefault(row["section"], []).append(row)
    assert list(found) == ["cache", *(asked.section for asked in FIRST.sections)]
    (unpacked,) = found["cache"]
    assert unpacked["kernels"] == len(list((out / "triton_cache").rglob("*.cubin"))) > 1
    assert found["compile"][0]["reason"] == "Triton's interpreter compiles nothing"
    assert len(found["families"]) == len(one_of_each())
    answered = [row for row in found["families"] if "refused" not in row]
    assert all(row["right"] for row in answered) and len(answered) > 40
    assert all("fp8" in row["name"] for row in found["families"] if "refused" in row)
    assert len(found["networks"]) == 3
    for row in found["networks"]:
        assert row["right"] and row["rms"] <= row["allowed"]
        assert row["call_ms"] > 0 and row["replay_ms"] > 0 and len(row["steps"]) > 5
    *asked, table = found["questions"]
    for group in ("l2", "launch", "layout"):
        answers = [row for row in asked if row["name"].startswith(group)]
        assert answers and any(row.get("us", 0) > 0 for row in answers)
        assert all(row["right"] for row in answers if "refused" not in row)
        assert answers[0]["group"] in table["table"]
    assert all(row["right"] and row["us"] > 0 for row in found["tuning"])
    (tiles,) = carry.glob("tiles_*.json")
    assert len(json.loads(tiles.read_text())["entries"]) == len(found["tuning"]) == 12
    command.append("--only=networks,tuning")
    again = subprocess.run(command, capture_output=True, text=True, env=here, timeout=100)
    assert again.returncode == 0 and "True" not in again.stdout  # all of it is known


@pytest.mark.interpret
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_the_second_run_in_the_interpreter(tmp_path: Path) -> None:
    out, carry = tmp_path / "out", tmp_path / "carry"
    here = {**environment(), "PYTEST_ADDOPTS": "-k test_vendor"}
    flags = [*TINY, "--plan=second", f"--out={out}", f"--carry={carry}", "--budget=2400"]
    command = [sys.executable, "-W", "ignore", "-m", "bench.gpu", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=here, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (carry / "gpu.jsonl").read_text().splitlines()]
    assert not any("error" in row or "refused" in row for row in rows)
    found = {row["section"]: [r for r in rows if r["section"] == row["section"]] for row in rows}
    assert list(found) == list(dict.fromkeys(asked.section for asked in SECOND.sections))
    tuned = [row["name"] for row in found["tuning"]]
    assert {name.split()[1] for name in tuned} == {"fp16", "int8"}
    assert all(row["right"] and row["us"] > 0 for row in found["tuning"])
    (tiles,) = carry.glob("tiles_*.json")
    assert len(json.loads(tiles.read_text())["entries"]) == len(tuned) == 21
    assert [row["name"] for row in found["tests"]] == ["first", "pytest"]
    assert all(row["right"] and " passed" in row["tail"][-1] for row in found["tests"])
    eager, compiled = found["speed"]  # of the network that was asked for, tuned as above
    assert [eager["name"], compiled["name"]] == ["v1.5 batch 2", "v1.5 batch 2, torch.compile"]
    targets = {one["target"] for one in eager["measurements"]}
    assert targets == {"fastres", "fastres int8", "eager channels_last"}
    assert {one["target"] for one in compiled["measurements"]} == {
        *targets,
        "torch.compile reduce-overhead",
    }
    again = subprocess.run(command, capture_output=True, text=True, env=here, timeout=100)
    assert again.returncode == 0 and "speed" not in again.stdout  # all of it is known
