"""fastres verify --backends: one table across backends, and what its exit status says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

import fastres
from fastres.backends.onnx_runtime import OnnxRuntimeExecutable

SMALL = "fastres:cifar_resnet8"
Run = Callable[..., Result]
RunJson = Callable[..., dict[str, Any]]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
def test_what_cannot_run_is_listed_and_no_failure(run: Run, run_json: RunJson) -> None:
    names = "cpu,triton,tensorrt,onnxruntime,reference"
    found = run_json("verify", SMALL, "--backends", names)["backends"]
    verdicts = {row["backend"]: row["verdict"] for row in found}
    assert list(verdicts) == names.split(",")
    assert {n for n, verdict in verdicts.items() if verdict == "PASSED"} == {
        "cpu",
        "onnxruntime",
        "reference",
    }
    assert all("no NVIDIA GPU" in row["reason"] for row in found if row["verdict"] == "not run")
    assert found[0]["report"]["outputs"][0]["rms"] > 0
    text = run("verify", SMALL, "--backends", "cpu,triton").stdout
    assert "PASSED" in text and "triton: there is no NVIDIA GPU" in text


def test_precisions_are_each_backend_s_own(run_json: RunJson) -> None:
    found = run_json("verify", SMALL, "--backends", "cpu,onnxruntime", "--precision", "fp16")
    cpu, other = found["backends"]
    assert cpu["verdict"] == "not run" and "not fp16" in cpu["reason"]
    assert other["verdict"] == "PASSED" and other["precision"] == "fp16"


def test_int8_from_one_table(
    run: Run, run_json: RunJson, trained: Path, photos_folder: Path, tmp_path: Path
) -> None:
    table, given = tmp_path / "t.json", ("--weights", trained)
    run("calibrate", SMALL, photos_folder, *given, "--algorithm", "minmax", "-o", table)
    more = ("--calibration", table, "--images", photos_folder)
    found = run_json("verify", SMALL, *given, *more, "--backends", "cpu,onnxruntime,reference")
    assert [row["verdict"] for row in found["backends"]] == ["PASSED"] * 3
    assert found["backends"][1]["precision"].startswith("int8")


def test_one_failure_is_status_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = OnnxRuntimeExecutable.run
    monkeypatch.setattr(
        OnnxRuntimeExecutable, "run", lambda self, inputs: [1.01 * y for y in real(self, inputs)]
    )
    result = run("verify", SMALL, "--backends", "cpu,onnxruntime", status=1)
    assert "FAILED" in result.stdout and "onnxruntime: output: largest error" in result.stdout


@no_gpu
def test_none_that_runs_is_status_3(run: Run) -> None:
    run("verify", SMALL, "--backends", "triton,tensorrt", status=3)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--backends", "tpu"), "backend is 'tpu'"),
        (("--backends", ""), "backend is ''"),
        (("--backends", "cpu", "--backend", "cpu"), "leave out ENGINE and --backend"),
    ],
)
def test_bad_arguments(run: Run, arguments: tuple[str, ...], text: str) -> None:
    assert text in run("verify", SMALL, *arguments, status=2).stderr


def test_the_witness_reads_pictures_and_any_batch(images: torch.Tensor) -> None:
    model = fastres.models.cifar_resnet(8, seed=0).eval()
    engine = fastres.compile(
        model,
        images[:1],
        backend="onnxruntime",
        preprocess=fastres.Preprocess(),
        io_dtype=torch.uint8,
    )
    for n in (1, 3):
        pixels = torch.randint(0, 256, (n, 64, 64, 3), dtype=torch.uint8)
        assert fastres.verify(model, engine, pixels).passed
    with pytest.raises(fastres.errors.UnsupportedError, match="not to be timed"):
        engine.profile(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    assert {node.precision for node in engine.info.nodes} == {"fp32"}


def test_a_layer_that_fails_is_the_reason(run: Run, run_json: RunJson, trained: Path) -> None:
    """No float32 engine comes so close in every layer, though some do in what the network gives."""
    tight = ("--layerwise", "--atol", "1e-9", "--rtol", "0")
    given = ("verify", SMALL, "--weights", trained, "--backends", "cpu", *tight)
    (found,) = run_json(*given, status=1)["backends"]
    layers = [row["name"] for row in found["report"]["layers"] if not row["passed"]]
    assert f"first layer beyond its bound: {layers[0]}" in found["reason"]
    text = run(*given, status=1).stdout
    assert f"cpu: {found['reason'][:30]}" in text and "nan" not in text
