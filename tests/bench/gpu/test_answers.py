"""Sections of bench.gpu on a GPU that refuses, or that is lost: told apart, ended, gone on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu import sections
from bench.gpu import stem as gpu_stem
from bench.gpu.answers import answer
from bench.gpu.questions import asking
from bench.gpu.questions.case import Case, Library
from bench.kernels import test_speed
from bench.kernels.posed import Posed
from fastres.backends.triton.planning.problems import Problem
from fastres.backends.triton.planning.table import Machine
from fastres.backends.triton.running import answering
from fastres.backends.triton.tuning import tune as tuning
from fastres.backends.triton.tuning.tune import Attempt
from fastres.errors import DeviceLost, UnsupportedError
from fastres.kernels.cost import Target
from fastres.kernels.geometry import ConvShape

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PROBLEMS = [Problem("pointers", ConvShape(2, 4, 4, 64, k, 1, 1), "fp16") for k in (64, 128, 256)]
Refuse = Callable[[], Any]


class Gpu:
    """Stands for one, on the CPU: it answers until it is lost."""

    def __init__(self) -> None:
        self.lost = False

    def check(self, device: torch.device, last: str) -> None:
        if self.lost:
            raise DeviceLost(f"last was {last}")

    def refuse(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("Triton Error [CUDA]: invalid argument")

    def lose(self, *_: Any, **__: Any) -> Any:
        self.lost = True
        self.refuse()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    monkeypatch.setattr(answering, "check_answers", found.check)
    return found


def right() -> dict[str, Any]:
    return {"right": True}


class TestAnswer:
    def test_a_refusal_is_an_answer(self, fake: Gpu) -> None:
        (row,) = answer("a", CPU, fake.refuse, group="g")
        assert row["refused"] == "RuntimeError: Triton Error [CUDA]: invalid argument"
        assert row["name"] == "a" and row["group"] == "g" and "right" not in row
        assert row["trace"].strip().endswith(row["refused"])
        assert list(answer("a", CPU, right)) == [{"name": "a", "right": True}]

    def test_where_none_may_be_it_is_wrong(self, fake: Gpu) -> None:
        (row,) = answer("a", CPU, fake.refuse, right=False)
        assert row["right"] is False and "refused" in row
        assert list(answer("a", CPU, right, right=False)) == [{"name": "a", "right": True}]

    def test_a_lost_gpu_is_a_wrong_row_and_the_end(self, fake: Gpu) -> None:
        rows = answer("a", CPU, fake.lose)
        assert next(rows) == {"name": "a", "right": False, "why": "last was a"}
        with pytest.raises(DeviceLost):
            next(rows)

    def test_one_that_is_lost_without_a_word_is_found(self, fake: Gpu) -> None:
        def quietly() -> dict[str, Any]:
            fake.lost = True
            return {"right": True}

        assert next(answer("a", CPU, quietly))["right"] is False

    def test_an_interrupt_of_a_library_is_none(self, fake: Gpu) -> None:
        def interrupted() -> Any:
            raise RuntimeError("KeyboardInterrupt: ")

        with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
            list(answer("a", CPU, interrupted))


def working(out: Path, section: str, **asked: Any) -> tuple[int, dict[str, dict[str, Any]]]:
    """One run of a section: its status, and all rows that are known then."""
    usual = {"device": CPU, "nets": ["resnet50"], "precisions": ["fp16", "int8"]}
    usual |= {"batch_sizes": [1], "image_size": 32}
    run = gpu.Run(out, **{**usual, "until": time.time() + 60, **asked})
    status = gpu.work(section, run)
    return status, gpu.latest(out, section)


def ended(rows: dict[str, dict[str, Any]], name: str) -> bool:
    return f"last was {name}" in rows.get("stopped", {}).get("error", "")


class TestTuning:
    @pytest.fixture(autouse=True)
    def section(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Three problems; each has two tiles, of which the GPU is asked by `_attempt`."""
        machine = Machine("NVIDIA H200", 132, "3.6.0", "0123")
        monkeypatch.setattr(sections, "this_machine", lambda device: machine)
        asked = {"v1.5": PROBLEMS, "v1": []}
        monkeypatch.setattr(sections, "_problems", lambda version, *_: asked[version])
        monkeypatch.setattr(sections, "TRIED", 2)
        monkeypatch.setattr(tuning, "make_trial", lambda problem, device: problem)

    def attempts(
        self, monkeypatch: pytest.MonkeyPatch, of: dict[Problem, Callable[[], Any]]
    ) -> list[Problem]:
        """What becomes of the first tile of a problem; others take 1 ms. Problems as they come."""
        tried: list[Problem] = []

        def attempt(problem: Problem, tile: Any, target: Target) -> Attempt:
            tried.append(problem)
            if problem in of and tried.count(problem) == 1:
                return of[problem]() or Attempt(tile, None, "0.1 off", wrong=True)
            return Attempt(tile, 1.0)

        monkeypatch.setattr(tuning, "_attempt", attempt)
        return tried

    def test_what_breaks_the_gpu_is_named_and_not_tried_again(
        self, fake: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        first, second, third = (problem.key for problem in PROBLEMS)
        tried = self.attempts(monkeypatch, {PROBLEMS[1]: fake.lose})
        status, rows = working(tmp_path, "tuning")
        tile = PROBLEMS[1].candidates(Target(90, 1))[0]
        assert status == gpu.LOST and ended(rows, f"{second} with {tile}")
        assert rows[first]["us"] == 1000 and rows[first]["right"] is True
        assert rows[second]["right"] is False and str(tile) in rows[second]["why"]
        assert third not in rows and tried == [PROBLEMS[0]] * 2 + [PROBLEMS[1]]
        fake.lost = False  # in another process
        status, rows = working(tmp_path, "tuning")
        assert status == 1 and rows[third]["right"] is True and rows[second]["right"] is False
        assert tried[3:] == [PROBLEMS[2]] * 2

    def test_a_refused_tile_is_neither_right_nor_wrong(
        self, fake: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        self.attempts(monkeypatch, {PROBLEMS[0]: fake.refuse})
        status, rows = working(tmp_path, "tuning")
        assert status == 0 and all(row["us"] == 1000 for row in rows.values())
        assert "invalid argument" in rows[PROBLEMS[0].key]["attempts"][0]["why"]

    def test_where_every_tile_is_refused_nothing_is_right(
        self, fake: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(tuning, "_attempt", fake.refuse)
        status, rows = working(tmp_path, "tuning")
        assert status == 0 and len(rows) == 3
        for row in rows.values():
            assert "right" not in row and "us" not in row
            assert row["refused"] == "RuntimeError: Triton Error [CUDA]: invalid argument"

    def test_a_wrong_tile_is_wrong_whatever_its_words(
        self, fake: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """In 8 bits they are others than in floating point."""
        self.attempts(monkeypatch, {PROBLEMS[0]: lambda: None})
        status, rows = working(tmp_path, "tuning")
        assert status == 1 and rows[PROBLEMS[0].key]["right"] is False
        assert rows[PROBLEMS[0].key]["us"] == 1000

    def test_operands_without_room_are_a_refusal(
        self, fake: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def full(problem: Problem, device: torch.device) -> Problem:
            if problem == PROBLEMS[0]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return problem

        self.attempts(monkeypatch, {})
        monkeypatch.setattr(tuning, "make_trial", full)
        status, rows = working(tmp_path, "tuning")
        assert status == 0 and "out of memory" in rows[PROBLEMS[0].key]["refused"]
        assert rows[PROBLEMS[1].key]["right"] is True


def forms_of(batch: int) -> list[str]:
    return [f"stem batch {batch}, {form}" for form in ("pixels", "folded", "overlapping boxes")]


class TestStem:
    def asking(self, fake: Gpu, monkeypatch: pytest.MonkeyPatch, **of: Refuse) -> list[str]:
        asked: list[str] = []

        def stem(form: str, *_: Any) -> dict[str, Any]:
            asked.append(form)
            return of.get(form, right)()  # type: ignore[no-any-return]

        monkeypatch.setattr(gpu_stem, "_stem", stem)
        return asked

    def test_a_lost_gpu_refuses_nothing(
        self, fake: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        asked = self.asking(fake, monkeypatch, folded=fake.lose)
        pixels, folded, boxes = forms_of(1)
        status, rows = working(tmp_path, "stem")
        assert status == gpu.LOST and ended(rows, folded) and boxes not in rows
        assert rows[pixels]["right"] is True and rows[folded]["right"] is False
        fake.lost = False
        status, rows = working(tmp_path, "stem")
        assert status == 1 and rows[boxes]["right"] is True
        assert asked == ["pixels", "folded", "overlapping boxes"]

    def test_what_the_driver_refuses_it_does(
        self, fake: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        self.asking(fake, monkeypatch, folded=fake.refuse)
        status, rows = working(tmp_path, "stem")
        assert status == 0 and "refused" in rows[forms_of(1)[1]] and len(rows) == 3


def test_a_question_that_breaks_the_gpu_ends_the_questions(
    fake: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def case(name: str, call: Callable[[], object]) -> Case:
        return Case("group", name, lambda device: Posed([Library(call, [])], lambda: None))

    every = [case("refused", fake.refuse), case("lost", fake.lose), case("well", lambda: None)]
    monkeypatch.setattr(asking, "cases", lambda tiles, small: every)
    status, rows = working(tmp_path, "questions")
    assert status == gpu.LOST and ended(rows, "group, lost") and "group, well" not in rows
    assert "invalid argument" in rows["group, refused"]["refused"]
    assert rows["group, lost"] | {"right": False, "group": "group"} == rows["group, lost"]
    fake.lost = False
    status, rows = working(tmp_path, "questions")
    assert status == 1 and rows["group, well"]["right"] is True


def test_a_network_that_is_refused_is_wrong_and_the_next_is_asked(
    fake: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def parity(made: object, x: object, precision: str, run: object) -> dict[str, Any]:
        if precision == "fp16":
            raise UnsupportedError("conv1 cannot run on sm_90")
        return {"right": True}

    monkeypatch.setattr(sections, "_parity", parity)
    status, rows = working(tmp_path, "parity", nets=["resnet18"])
    assert status == 1 and rows["resnet18 v1.5 int8"]["right"] is True
    assert rows["resnet18 v1.5 fp16"]["right"] is False
    assert "conv1 cannot run" in rows["resnet18 v1.5 fp16"]["refused"]


def test_a_kernel_that_does_not_compile_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = []

    def compile_kernel(launch: object, sm: int) -> object:
        compiled.append(launch)
        if len(compiled) == 2:
            raise RuntimeError("PassManager::run failed")
        return None

    monkeypatch.setattr(sections, "compile_kernel", compile_kernel)
    job = ("plan", "cifar_resnet:8", "v1.5", "fp16", 2, Target.typical(90), 32)
    assert sections._compile(job) == len(compiled) - 1 > 3


def test_kernel_benchmarks_end_with_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[str] = []

    def synchronize(device: torch.device) -> None:
        if lost:
            raise torch.AcceleratorError("CUDA error: misaligned address")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    test_speed.end_if_lost("test_kernel[boxes]")
    lost.append("now")
    with pytest.raises(pytest.exit.Exception, match=r"last was test_kernel\[boxes\].*misaligned"):
        test_speed.end_if_lost("test_kernel[boxes]")
