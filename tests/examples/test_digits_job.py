"""examples/digits_job.py: what make run shows of trained networks, on the bottleneck net."""

from __future__ import annotations

import io
from collections.abc import Iterator

import digits_job
import numpy as np
import pytest
import torch
from corruptions import KINDS
from networks import facts_of
from rich.console import Console
from torch import Tensor

from fastres.engine.engine import Engine

NAME = "bottleneck"


def console() -> Console:
    return Console(record=True, width=200, file=io.StringIO())


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Engine]]:
    found = digits_job.compiled(NAME, console())
    yield found
    for engine in found.values():
        engine.close()


@pytest.fixture(scope="module")
def judged() -> tuple[Tensor, np.ndarray]:
    """Clean, and every other kind of damage."""
    x, labels = digits_job.inputs(NAME)
    return x[::2], labels


@pytest.fixture(scope="module")
def classes(engines: dict[str, Engine], judged: tuple[Tensor, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: digits_job.answers(engine, judged[0]) for name, engine in engines.items()}


def test_int8_keeps_what_it_promises(
    classes: dict[str, np.ndarray], judged: tuple[Tensor, np.ndarray]
) -> None:
    facts = facts_of(digits_job.WEIGHTS / f"digits_{NAME}.safetensors")["validation"]
    found = {
        name: digits_job.score(own, classes["fp32"], judged[1]) for name, own in classes.items()
    }
    assert found["fp32"].clean == pytest.approx(facts["accuracy"], abs=1.5 / 359)
    said = [facts["corrupted"][kind] for kind in list(KINDS)[1::2]]
    assert found["fp32"].damaged == pytest.approx(np.mean(said), abs=0.005)
    assert found["fp32"].same == 1
    whole = {name: (own == judged[1]).mean(0) for name, own in classes.items()}
    difference = whole["int8"] - whole["fp32"]
    noise = 1.96 * difference.std() / len(difference) ** 0.5
    assert difference.mean() >= -0.003 - noise and noise < 0.005
    # 99.1 % measured; the damaged pictures near a border of two classes fall on either side
    assert found["int8"].same >= 0.985
    assert (classes["int8"][0] == classes["fp32"][0]).mean() >= 0.99


def test_scores_counted_by_hand() -> None:
    labels = np.array([0, 1, 2, 3])
    own = np.array([[0, 1, 2, 0], [0, 0, 0, 0], [0, 1, 0, 0]])
    base = np.array([[0, 1, 2, 3], [0, 0, 0, 0], [0, 1, 0, 1]])
    found = digits_job.score(own, base, labels)
    assert (found.clean, found.damaged, found.same) == (0.75, 3 / 8, 10 / 12)


def test_answers_are_the_models(
    engines: dict[str, Engine], judged: tuple[Tensor, np.ndarray]
) -> None:
    few = judged[0][:2, :7]
    found = digits_job.answers(engines["fp32"], few)
    one_by_one = [int(engines["fp32"](x[None]).argmax()) for x in few.flatten(0, 1)]
    assert found.shape == (2, 7) and found.ravel().tolist() == one_by_one


def test_the_table(
    engines: dict[str, Engine],
    judged: tuple[Tensor, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = judged[0][:, : digits_job.AT_ONCE], judged[1][: digits_job.AT_ONCE]
    monkeypatch.setattr(digits_job, "NAMES", (NAME,))
    monkeypatch.setattr(digits_job, "compiled", lambda name, console: engines)
    monkeypatch.setattr(digits_job, "inputs", lambda name: few)
    monkeypatch.setattr(Engine, "close", lambda self: None)
    shown = console()
    digits_job.show(shown, 0.05)
    text = shown.export_text()
    for name in engines:
        assert f"{NAME} {name}" in text
    assert "64 digits that the networks have not seen, 13 kinds of damage to each" in text
    assert " 1x " in text and "img/s" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has tf32")
def test_a_precision_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits_job, "PRECISIONS", ("tf32",))
    monkeypatch.setattr(digits_job, "CALIBRATION", 8)
    shown = console()
    assert digits_job.compiled("resnet20", shown) == {}
    assert "resnet20 tf32 is left out: cpu refuses the precision" in shown.export_text()
