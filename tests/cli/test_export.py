"""fastres export: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import Result

SMALL = "fastres:cifar_resnet8"
Run = Callable[..., Result]
RunJson = Callable[..., dict[str, Any]]


def test_fp16(run_json: RunJson, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    found = run_json("export", SMALL, "--weights", trained, "--precision", "fp16", "-o", file)
    assert found["bytes"] == file.stat().st_size and found["int8_layers"] == 0
    assert found["inputs"] == ["x: f32[N, 3, 32, 32]"]
    types = {tensor.data_type for tensor in onnx.load(file).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types


@pytest.mark.parametrize("placement", ["tensorrt", "openvino"])
def test_int8(run: Run, run_json: RunJson, trained: Path, tmp_path: Path, placement: str) -> None:
    file, table, data = (tmp_path / name for name in ("net.onnx", "t.json", "x.npy"))
    np.save(data, np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype("f4"))
    given = (SMALL, "--weights", trained)
    run("calibrate", SMALL, data, "--weights", trained, "--algorithm", "minmax", "-o", table)
    more = ("--calibration", table, "--placement", placement, "-o", file)
    found = run_json("export", *given, *more)
    layers = {"Conv", "Gemm"}
    written = sum(node.op_type in layers for node in onnx.load(file).graph.node)
    assert found["int8_layers"] == written == 8
    assert f"{file}: " in run("export", *given, *more).stdout


def test_untrained_weights_are_said(run: Run, tmp_path: Path) -> None:
    result = run("export", SMALL, "-o", tmp_path / "net.onnx")
    assert "untrained" in result.stderr and "MB" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((SMALL,), "give -o FILE"),
        ((SMALL, "-o", "net.onnx", "--to", "tflite"), "there is onnx"),
        ((SMALL, "-o", "net.onnx", "--precision", "int8"), "needs calibration="),
        ((SMALL, "-o", "net.onnx", "--precision", "bf16"), "fp32, fp16 and int8"),
        ((SMALL, "-o", "net.onnx", "--placement", "trt"), "tensorrt and openvino"),
        ((SMALL, "-o", "no/such/net.onnx"), "cannot be written"),
        ((SMALL, "-o", "net.onnx", "--calibration", "none.json"), "none.json"),
        (("-o", "net.onnx"), "give a model"),
    ],
)
def test_bad_arguments(
    run: Run, arguments: tuple[str, ...], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert text in run("export", *arguments, status=2).stderr
    assert not list(tmp_path.iterdir())


def test_it_does_not_write_over_what_it_reads(run: Run, trained: Path, tmp_path: Path) -> None:
    weights, link = tmp_path / "w.safetensors", tmp_path / "link.onnx"
    weights.write_bytes(trained.read_bytes())
    link.symlink_to(weights)
    for output in (weights, link):
        result = run("export", SMALL, "--weights", weights, "-o", output, status=2)
        assert "is what is read here: give another file" in result.stderr
    assert weights.read_bytes() == trained.read_bytes()


def test_a_link_stays_and_a_pipe_is_left_alone(run: Run, trained: Path, tmp_path: Path) -> None:
    real, link, pipe = tmp_path / "real.onnx", tmp_path / "link.onnx", tmp_path / "pipe"
    link.symlink_to(real)
    given = ("export", SMALL, "--weights", trained, "-o")
    run(*given, link)
    assert link.is_symlink() and onnx.load(real).graph.node
    os.mkfifo(pipe)
    assert "no regular file" in run(*given, pipe, status=2).stderr and pipe.is_fifo()
