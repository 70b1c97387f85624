"""fastres compile and inspect: what they say, what they save, what they refuse."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from typer.testing import Result

import fastres
from fastres import models

Run = Callable[..., Result]
RunJson = Callable[..., dict[str, Any]]


def test_compile_tells_and_saves(run: Run, run_json: RunJson, small: str, tmp_path: Path) -> None:
    path = tmp_path / "engine"
    facts = run_json("compile", small, "--batch-size", "2,1", "-o", path, "--backend", "cpu")
    assert facts["backend"] == "cpu" and facts["precision_ran"] == "fp32"
    assert facts["nodes"] < facts["captured_nodes"] and facts["operations"]["conv2d"] == 7
    assert facts["input"] == "f32[N, 3, 32, 32]" and facts["compile_seconds"] > 0
    assert (path / "manifest.json").exists() and facts["saved"] == str(path)
    text = run("inspect", path).stdout
    assert f"{facts['nodes']} nodes on cpu in fp32" in text and "layer1.0.conv1" in text


def test_compile_shows_the_precision_that_runs(run: Run, small: str) -> None:
    text = run("compile", small, "--backend", "reference", "--image-size", "40").stdout
    assert "fp32 asked for, fp32 run" in text and "f32[N, 3, 40, 40]" in text
    assert "give -o PATH" in text


def test_weights_alone_build_the_network(run_json: RunJson, trained: Path, tmp_path: Path) -> None:
    facts = run_json("compile", "--weights", trained)
    assert facts["model"] == str(trained) and facts["input"] == "f32[N, 3, 32, 32]"


def test_bottlenecks_without_code_need_a_version(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "bottleneck.safetensors"
    net = models.ResNet(models.Bottleneck, (1, 1, 1), planes=8, stem="cifar", num_classes=3)
    safetensors.torch.save_file(net.state_dict(), path)
    assert "v1.5" in run("inspect", "--weights", path, status=2).stderr
    flags = ("--weights", path, "--version", "v1", "--image-size", "40", "--backend", "reference")
    assert "f32[N, 3, 40, 40] = input" in run("inspect", *flags, "--graph").stdout


def test_inspect_dumps_the_graph(run: Run, run_json: RunJson, engine: Path, tmp_path: Path) -> None:
    dump = run("inspect", engine, "--graph").stdout
    assert "conv1: f32[N, 16, 32, 32] = conv2d(x" in dump and "return " in dump
    report = tmp_path / "report.json"
    document = run_json("inspect", engine, "--graph", "-o", report)
    assert "\n".join(document["graph"]) == dump.rstrip("\n")
    assert document["nodes"][0]["fused"] == ["conv1", "bn1", "relu"]
    assert json.loads(report.read_text()) == document


def test_a_pipe_gets_the_report_and_nothing_else(
    shell: Callable[..., subprocess.CompletedProcess[str]], engine: Path
) -> None:
    found = shell("inspect", engine, "--json")
    assert (found.returncode, found.stderr) == (0, "")
    assert "\x1b" not in found.stdout and json.loads(found.stdout)["backend"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fastres:resnet51",), "there is no fastres:resnet51"),
        ((), "give a model"),
        (("SMALL", "--backend", "quantum"), "there are auto, cpu"),
        (("SMALL", "--backend", ""), "backend is ''"),
        (("SMALL", "--precision", "fp12"), "supported are"),
        (("SMALL", "--backend", "cpu", "--precision", "fp16"), "cpu runs fp32, bf16 and int8"),
        (("SMALL", "--batch-size", "0,x"), "not an integer of at least 1"),
        (("SMALL", "--device", "toaster"), "toaster"),
        (("SMALL", "--on-unsupported", "pray"), "supported are"),
        (("SMALL", "--version", "v3"), "there are v1 and v1.5"),
        (("SMALL", "--weights", "nowhere.pth"), "there is no file nowhere.pth"),
        (("--weights", "ENGINE"), "is a saved engine"),
        (("ENGINE",), "is a file or folder"),
        (("SMALL", "-o", "PHOTOS"), "photos"),
        (("SMALL", "--tune", "--target", "sm_90"), "tuning needs a sm_90 GPU"),
    ],
)
def test_compile_refuses(
    arguments: tuple[str, ...],
    said: str,
    run: Run,
    small: str,
    engine: Path,
    photos_folder: Path,
) -> None:
    meant = {"SMALL": small, "ENGINE": engine, "PHOTOS": photos_folder}
    result = run("compile", *(meant.get(a, a) for a in arguments), status=2)
    assert result.stdout == "" and result.stderr.startswith("error: ") and said in result.stderr


@pytest.mark.parametrize("place", ["no/folder/e.fastres", "PHOTOS", ""])
def test_where_it_cannot_be_saved_it_is_not_compiled(
    place: str, run: Run, small: str, photos_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastres, "compile", lambda *given, **more: pytest.fail("it was"))
    result = run("compile", small, "-o", photos_folder if place == "PHOTOS" else place, status=2)
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("PHOTOS",), "photos"),
        (("nowhere.fastres",), "there is no model or saved engine 'nowhere.fastres'"),
        (("WEIGHTS",), "give it as --weights"),
        (("ENGINE", "--precision", "bf16"), "--precision cannot be given with it"),
        (("ENGINE", "--backend", "cpu", "--threads", "2"), "--backend, --threads cannot"),
        (("DAMAGED",), "error: "),
        (("ENGINE", "--tune"), "--tune cannot be given with it"),
        (("ENGINE", "--cache-dir", "there"), "--cache-dir cannot be given with it"),
        (("nowhere.fastres", "--trust-engine"), "there is no model or saved engine"),
    ],
)
def test_inspect_refuses(
    arguments: tuple[str, ...],
    said: str,
    run: Run,
    engine: Path,
    trained: Path,
    photos_folder: Path,
    tmp_path: Path,
) -> None:
    damaged = tmp_path / "damaged.fastres"
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    meant = {"ENGINE": engine, "PHOTOS": photos_folder, "WEIGHTS": trained, "DAMAGED": damaged}
    result = run("inspect", *(meant.get(a, a) for a in arguments), status=2)
    assert result.stdout == "" and said in result.stderr


def test_a_report_that_cannot_be_written_is_an_error(
    run: Run, engine: Path, tmp_path: Path
) -> None:
    result = run("inspect", engine, "-o", tmp_path / "no" / "such" / "folder.json", status=2)
    assert "cannot be written: No such file or directory" in result.stderr


@pytest.mark.compile
def test_building_for_a_gpu_that_is_not_here(
    run: Run, run_json: RunJson, small: str, tmp_path: Path
) -> None:
    path = tmp_path / "gpu.fastres"
    facts = run_json("compile", small, "--target", "sm_90", "--precision", "fp16", "-o", path)
    assert facts["target"] == "sm_90" and facts["backend"] == "triton"
    assert all(k["spilled"] == 0 and k["registers"] > 0 for k in facts["kernels"])
    text = run("inspect", path, "--target", "sm_90", "--trust-engine").stdout
    assert "HGMMA" in text and f"{len(facts['kernels'])} kernels" in text
    assert "no NVIDIA GPU" in run("inspect", path, status=3).stderr
    assert (
        "for this machine only"
        in run("compile", small, "--target", "sm_90", "--backend", "cpu", status=3).stderr
    )
    assert "No such option" in run("verify", small, "--target", "sm_90", status=2).stderr
