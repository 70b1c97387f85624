"""fastres calibrate, and what the other commands do with its table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import fastres
from fastres.calib.table import CalibrationTable
from fastres.cli.main import app
from fastres.cli.models import load_weights

SMALL = "fastres:cifar_resnet8"
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """Made of random inputs, with the weights of the tests' small network."""
    folder = tmp_path_factory.mktemp("table")
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(8, 3, 32, 32)).astype("f4"))
    arguments = ["calibrate", SMALL, str(folder / "x.npy"), "--weights", str(trained)]
    result = CliRunner().invoke(
        app, [*arguments, "--algorithm", "mse", "-o", str(folder / "t.json")]
    )
    assert result.exit_code == 0, result.output
    return folder / "t.json"


def test_a_folder_of_images(
    run_json: Callable[..., dict[str, Any]], photos_folder: Path, trained: Path, tmp_path: Path
) -> None:
    output = tmp_path / "t.json"
    document = run_json(
        "calibrate", SMALL, photos_folder, "--weights", trained, "-o", output, "--samples", 2
    )
    assert document["samples"] == 2 and document["saved"] == str(output)
    made = CalibrationTable.load(output)
    assert made.algorithm == document["algorithm"] and made.samples == 2
    assert document["tensors"] == len(made.tensors) and document["curve"] == []


def test_without_an_output_it_says_so(run: Run, photos_folder: Path, trained: Path) -> None:
    result = run("calibrate", SMALL, photos_folder, "--weights", trained, "--algorithm", "minmax")
    assert "the table is not kept: give -o FILE" in result.stderr
    assert "minmax" in result.stdout


def test_the_way_from_a_table_to_numbers(
    run: Run, run_json: Callable[..., dict[str, Any]], table: Path, trained: Path, tmp_path: Path
) -> None:
    engine = tmp_path / "e.fastres"
    given = ("--weights", trained, "--calibration", table)
    made = run_json("compile", SMALL, *given, "--precision", "int8", "-o", engine)
    assert made["precision"] == "int8" and made["not_quantised"] == []
    assert any("int8 products by" in note for note in made["notes"])
    report = run_json("verify", SMALL, engine, "--weights", trained, "--layerwise")
    assert report["passed"] and report["quantised"] and len(report["layers"]) > 8
    text = run("verify", SMALL, *given, "--layerwise").stdout
    figures = [float(line.split("│")[-3]) for line in text.splitlines() if "│ conv2d" in line]
    assert figures == sorted(figures) and len(figures) > 3  # the worst first
    brief = ("--duration", 0.05, "--launches", 1, "--peers", "none")
    timed = run_json("bench", SMALL, *given, "--precision", "fp32,int8", *brief)
    assert {m["precision"] for m in timed["measurements"]} >= {"fp32"}
    assert "int8" in json.dumps(timed)


def labelled(folder: Path, network: torch.nn.Module, wrong: int) -> Path:
    """Pictures in folders of the class that the network gives them, some in another's."""
    preprocess = fastres.Preprocess(resize=36, crop=32)
    draw = np.random.default_rng(0)
    for name in range(10):
        (folder / f"{name:02}").mkdir(parents=True)
    made = dict.fromkeys(range(10), 0)
    i = 0
    while min(made.values()) < 1 or i < 40:
        pixels = draw.integers(0, 256, 3) + draw.normal(size=(36, 36, 3)) * draw.uniform(5, 120)
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        with torch.no_grad():
            found = int(network(preprocess(picture)[None]).argmax())
        label = (found + 1) % 10 if i < wrong else found
        picture.save(folder / f"{label:02}" / f"{i}.png")
        made[label] += 1
        i += 1
        if i > 60:
            break
    for name, count in made.items():
        if not count:  # a class that nothing is given: any picture will do
            Image.new("RGB", (36, 36), (9 * name, 0, 0)).save(folder / f"{name:02}" / "x.png")
    return folder


def test_accuracy_before_and_after(
    run: Run,
    run_json: Callable[..., dict[str, Any]],
    photos_folder: Path,
    trained: Path,
    tmp_path: Path,
) -> None:
    network = fastres.models.cifar_resnet(8).eval()
    load_weights(network, SMALL, trained)
    folder = labelled(tmp_path / "val", network, wrong=4)
    given = ("calibrate", SMALL, photos_folder, "--weights", trained, "--algorithm", "mse")
    document = run_json(*given, "--val", folder, "--max-drop", 0.5, "-o", tmp_path / "t.json")
    before, after = document["curve"]
    assert before["algorithm"] == "" and after["algorithm"] == "mse"
    assert 0.5 < before["accuracy"] < 1.0
    assert after["accuracy"] >= before["accuracy"] - 0.5
    assert document["kept"] == []
    text = run(*given, "--val", folder).stdout
    assert "top-1 accuracy on cpu" in text and f"{before['accuracy']:.2%}" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((SMALL,), "give the calibration data after the model"),
        ((SMALL, "a", "b"), "one path, got"),
        ((SMALL, "/nowhere"), "no file or folder /nowhere"),
        ((SMALL, "/nowhere.npy"), "cannot be read as an array"),
        ((SMALL, "PHOTOS", "--algorithm", "best"), "algorithm is 'best'"),
        ((SMALL, "PHOTOS", "--max-drop", "0.1"), "--max-drop needs --val"),
        ((SMALL, "PHOTOS", "--val", "PHOTOS"), "a folder of images for each class"),
        ((SMALL, "PHOTOS", "--ignore", "stem"), "fits no layer"),
        ((SMALL, "PHOTOS", "--mean", "1"), "--mean '1': expected 3 numbers"),
        ((SMALL, "PHOTOS", "-o", "/no/such/t.json"), "cannot be written"),
    ],
)
def test_wrong_use(run: Run, photos_folder: Path, arguments: tuple[str, ...], says: str) -> None:
    given = [str(photos_folder) if a == "PHOTOS" else a for a in arguments]
    assert says in run("calibrate", *given, status=2).stderr


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3, 31, 32), "f4"), np.zeros((0, 3, 32, 32), "f4"), np.zeros(3, "i8")]
)
def test_arrays_that_do_not_fit(run: Run, tmp_path: Path, array: Any) -> None:
    np.save(tmp_path / "x.npy", array)
    assert "calibration data" in run("calibrate", SMALL, tmp_path / "x.npy", status=2).stderr


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((2, 32, 32, 3), "u1"), "uint8[2, 32, 32, 3]"),
        (np.zeros((2, 32, 32, 3), "u1"), "decoded pictures, channels last"),
        (np.zeros((2, 32, 32, 3)), "x.permute(0, 3, 1, 2)"),
        (np.zeros((3, 32, 32), "f4"), "it is a single image"),
        (np.zeros((2, 1, 32, 32), "f2"), "pictures are gray"),
    ],
)
def test_arrays_of_the_wrong_kind_are_told_what_to_become(
    run: Run, tmp_path: Path, array: Any, says: str
) -> None:
    np.save(tmp_path / "x.npy", array)
    text = run("calibrate", SMALL, tmp_path / "x.npy", status=2).stderr
    assert says in " ".join(text.split()) and "calibration data" in text


def test_an_odd_image_is_noted(
    run: Run, run_json: Callable[..., dict[str, Any]], trained: Path, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).normal(size=(8, 3, 32, 32))
    images[5] *= 100
    np.save(tmp_path / "x.npy", images)  # in float64
    given = ("calibrate", SMALL, tmp_path / "x.npy", "--weights", trained, "--algorithm", "mse")
    assert "image 5 (" in run(*given).stderr
    (note,) = run_json(*given)["notes"]
    assert "far from the rest" in note


def test_tables_that_do_not_fit(run: Run, table: Path, trained: Path, tmp_path: Path) -> None:
    assert "other weights" in run("compile", SMALL, "--calibration", table, status=2).stderr
    text = run("compile", "fastres:cifar_resnet14", "--calibration", table, status=2).stderr
    assert "another network" in text
    assert "needs calibration=" in run("compile", SMALL, "--precision", "int8", status=2).stderr
    (tmp_path / "t.json").write_bytes(table.read_bytes()[:100])
    given = ("--weights", trained, "--calibration", tmp_path / "t.json")
    assert "is no calibration table" in run("compile", SMALL, *given, status=2).stderr
    given = ("--weights", trained, "--calibration", table, "--precision", "bf16")
    text = run("compile", SMALL, *given, status=2).stderr
    assert "calibration= is for precision='int8' and 'fp8'" in text
