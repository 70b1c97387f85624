"""bench.kernels.predictions: rows are the plan's, sums add up, no claim to have measured."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import fastres
from bench.kernels import predictions
from bench.kernels.predictions import LABEL, Prediction, predict
from fastres import models
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.overlap import LAUNCH_US
from fastres.backends.triton.planning.table import Tiles, shipped_for
from fastres.graph.cost import multiply_adds
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.graph.shapes import infer_shapes
from fastres.kernels.cost import Target
from fastres.options import Precision

SM_90, SM_80 = Target.typical(90), Target.typical(80)


@cache
def resnet50() -> Graph:
    return optimise(fastres.build(models.resnet50(seed=0).state_dict(), version="v1.5"))


@cache
def predicted(target: Target, precision: Precision, batch_size: int) -> Prediction:
    return predict(resnet50(), target, precision, batch_size)


@pytest.mark.parametrize("target", [SM_90, SM_80], ids=["sm_90", "sm_80"])
@pytest.mark.parametrize("batch", [1, 256])
def test_rows_are_the_steps_of_the_plan(target: Target, batch: int) -> None:
    found = predicted(target, "fp16", batch)
    shape = (batch, 3, 224, 224)
    plan = make_plan(resnet50(), (shape,), "fp16", Tiles(target, shipped_for(target)))
    of = {node: row for row in found.rows for node in row.nodes}
    assert sorted(of) == sorted(step.node for step in plan.steps)
    for step in plan.steps:
        tile = getattr(step, "tile", None)
        row = of[step.node]
        assert row.estimated == (tile is not None)
        assert tile is None or row.tile == str(tile)
    assert len(found.rows) < len(plan.steps)
    assert found.launch_us == (0 if plan.dependent else LAUNCH_US * len(plan.steps))


@pytest.mark.parametrize("batch", [1, 32])
def test_the_work_is_that_of_the_graph(batch: int) -> None:
    """But for the zeros that a folded stem multiplies, and what its pool compares."""
    graph = resnet50()
    shapes = infer_shapes(graph, [(batch, 3, 224, 224)])
    wanted = 2 * sum(multiply_adds(node, shapes, graph) for node in graph)
    pixels = 112 * 112 * 64  # of a stem that has 147 taps, and 256 where it is folded
    wanted += batch * (2 * (256 - 147) * pixels + 9 * pixels // 4)
    rows = predicted(SM_90, "fp16", batch).rows
    products = [row for row in rows if row.estimated]
    found = sum(len(r.nodes) * r.rates.tflops * r.rates.microseconds * 1e6 for r in products)
    assert [row.kernel for row in rows].count("stem and pool") == 1
    assert found == pytest.approx(wanted)


def test_rates_follow_from_the_time() -> None:
    found = predicted(SM_90, "int8", 32)
    for row in found.rows:
        r = row.rates
        assert 0 < r.share_of_roofline <= 1.0001, row
        assert r.least_us == pytest.approx(r.share_of_roofline * r.microseconds)
        assert (r.bound == "launch") == (r.least_us < LAUNCH_US)
        assert row.estimated or r.share_of_roofline == pytest.approx(1)
    assert {row.rates.bound for row in found.rows} == {"arithmetic", "memory", "launch"}
    total = sum(len(row.nodes) * row.rates.microseconds for row in found.rows) + found.launch_us
    assert found.images_per_second == pytest.approx(32e6 / total)


def test_it_says_that_nothing_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "predictions.json"
    flags = ["--gpu=sm_80", "--batch-size=1,2", "--precision=fp16", "-o", str(file)]
    assert predictions.main(flags) == 0
    text = capsys.readouterr().out
    assert "PREDICTED" in LABEL and "not measured" in LABEL
    assert " ".join(text.split()).count(LABEL) == 2 and text.count("predicted, not measured") == 2
    assert "images/s" in text and "64->64 3x3" in text and "of roofline" in text
    fields: dict[str, Any] = json.loads(file.read_text())
    one, two = fields["predictions"]
    assert fields["note"] == LABEL and not one["measured"] and one["gpu"] == "sm_80"
    assert (one["batch_size"], two["batch_size"]) == (1, 2)
    assert one["predicted_images_per_second"] > 0 and "images_per_second" not in one
    assert one["rows"][1]["rates"]["tflops"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu=sm_70"], "the kernels need sm_80 or newer"),
        (["--gpu=h200"], "give a GPU architecture such as 'sm_90'"),
        (["--batch-size=1,0"], "expected positive numbers"),
        (["--batch-size="], "expected positive numbers"),
        (["--batch-size=1000000", "--precision=fp16"], "output pixels, expected under 2**31"),
        (["--precision=fp16,fp12"], "--precision fp12: the precisions are fp32"),
        (["--precision=fp8", "--gpu=sm_80"], "sm_80 has no products of fp8"),
        (["--speed=1"], "unrecognized arguments"),
    ],
    ids=str,
)
def test_wrong_use(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        predictions.main(flags)
    assert ended.value.code == 2 and message in capsys.readouterr().err
