"""fastres predict: classes of real photographs, names for them, and what it refuses."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import Result

import fastres
from fastres import Preprocess

Run = Callable[..., Result]
RunJson = Callable[..., dict[str, Any]]


def test_a_saved_engine_names_classes(
    run: Run, run_json: RunJson, engine: Path, photos_folder: Path, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"kind {i}\n" for i in range(10)))
    document = run_json("predict", engine, photos_folder, "--top-k", "3", "--labels", labels)
    assert document["untrained"] is None  # a saved engine does not tell
    rows = document["predictions"]
    names = ("astronaut", "chelsea", "coffee")
    assert [Path(row["image"]).stem for row in rows] == sorted(names)
    for row in rows:
        chances = [best["probability"] for best in row["top"]]
        assert len(chances) == 3 and chances == sorted(chances, reverse=True)
        assert all(best["label"] == f"kind {best['class']}" for best in row["top"])

    expected = fastres.load(engine)
    expected.preprocess = Preprocess(resize=36, crop=32)
    found = expected.predict([row["image"] for row in rows], top_k=3)
    assert [[b["class"] for b in row["top"]] for row in rows] == [list(p.classes) for p in found]
    text = run("predict", engine, photos_folder / "coffee.jpg", "--labels", labels).stdout
    assert rows[2]["top"][0]["label"] in text and "%" in text


def test_an_untrained_model_says_so(run: Run, small: str, photos_folder: Path) -> None:
    result = run("predict", small, photos_folder / "coffee.jpg", "--backend", "reference")
    assert "untrained weights" in result.stderr and "untrained" not in result.stdout


def test_weights_alone_and_ones_own_preprocessing(
    run_json: RunJson, trained: Path, photos_folder: Path
) -> None:
    image = photos_folder / "chelsea.jpg"
    flags = ("--weights", trained, "--backend", "reference")
    plain = run_json("predict", image, *flags)
    darker = run_json("predict", image, *flags, "--mean", "0.9,0.9,0.9", "--std", "1,1,1")
    larger = run_json("predict", image, *flags, "--crop", "48", "--resize", "48")
    assert plain["untrained"] is False
    assert plain["predictions"] != darker["predictions"] != larger["predictions"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ENGINE",), "give the images"),
        (("ENGINE", "nowhere.jpg"), "there is no file or folder nowhere.jpg"),
        (("ENGINE", "README"), "cannot be read as an image"),
        (("ENGINE", "EMPTY"), "no image below"),
        (("ENGINE", "COFFEE", "--labels", "nowhere.txt"), "--labels nowhere.txt"),
        (("ENGINE", "COFFEE", "--labels", "README"), "the network 10 classes"),
        (("ENGINE", "COFFEE", "--labels", "COFFEE"), "cannot be read"),
        (("ENGINE", "COFFEE", "--mean", "1,2"), "expected 3 numbers"),
        (("ENGINE", "COFFEE", "--std", "0,1,1"), "every entry must be above 0"),
        (("ENGINE", "COFFEE", "--resize", "16"), "smaller than the crop"),
        (("ENGINE", "COFFEE", "--crop", "40", "--resize", "40"), "expected [N, 3, 32, 32]"),
        (("fastres:resnet51", "COFFEE"), "there is no fastres:resnet51"),
    ],
)
def test_predict_refuses(
    arguments: tuple[str, ...],
    said: str,
    run: Run,
    engine: Path,
    photos_folder: Path,
    tmp_path: Path,
) -> None:
    meant = {
        "ENGINE": engine,
        "EMPTY": tmp_path,
        "README": photos_folder / "README.md",
        "COFFEE": photos_folder / "coffee.jpg",
    }
    result = run("predict", *(meant.get(a, a) for a in arguments), status=2)
    assert result.stdout == "" and said in result.stderr and "Traceback" not in result.stderr


def test_a_name_that_is_no_text(
    run: Run, run_json: RunJson, engine: Path, photos_folder: Path, tmp_path: Path
) -> None:
    odd = tmp_path / os.fsdecode(b"\xff\x1b[31m.jpg")
    shutil.copy(photos_folder / "coffee.jpg", odd)
    assert "\\udcff\\x1b[31m.jpg" in run("predict", engine, odd).stdout
    (row,) = run_json("predict", engine, odd)["predictions"]
    assert row["image"].endswith("\\udcff\\x1b[31m.jpg")
    assert "\x1b" not in run("predict", engine, f"{odd}.png", status=2).stderr


def test_bad_pictures_in_rows_of_their_own(
    run: Run, run_json: RunJson, engine: Path, photos_folder: Path, tmp_path: Path
) -> None:
    coffee, readme = photos_folder / "coffee.jpg", photos_folder / "README.md"
    odd = tmp_path / "line\nbreak.jpg"
    odd.write_text("no picture")
    words = ("predict", engine, readme, coffee, odd)
    assert "README.md cannot be read" in run(*words, status=2).stderr
    said = run(*words, "--on-error", "row")
    assert "note: 2 of 3 images could not be taken" in said.stderr
    assert "line\\nbreak.jpg\n" in said.stdout and "line\nbreak" not in said.stdout
    assert f"  {readme} cannot be read as an image" in said.stdout
    first, second, _ = run_json(*words, "--on-error", "row")["predictions"]
    assert first["top"] == [] and "README.md cannot be read" in first["error"]
    assert second["error"] is None and len(second["top"]) == 5
    assert "on_error is 'skip'" in run(*words, "--on-error", "skip", status=2).stderr


def test_how_pictures_are_turned_and_how_large_they_may_be(
    run: Run, run_json: RunJson, engine: Path, photos_folder: Path, tmp_path: Path
) -> None:
    tag = Image.Exif()
    tag[0x0112] = 3
    with Image.open(photos_folder / "coffee.jpg") as photo:
        photo.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "a.png", exif=tag)
        photo.save(tmp_path / "b.png")

    def top(name: str, *flags: str) -> Any:
        return run_json("predict", engine, tmp_path / name, *flags)["predictions"][0]["top"]

    assert top("a.png") == top("b.png") == top("a.png", "--exif") != top("a.png", "--no-exif")
    few = run("predict", engine, tmp_path / "a.png", "--max-pixels", "1000", status=2)
    assert "at most 1000 are taken" in few.stderr


def test_labels_are_read_of_files_alone(run: Run, engine: Path, photos_folder: Path) -> None:
    words = ("predict", engine, photos_folder / "coffee.jpg", "--labels", "/dev/zero")
    assert "--labels /dev/zero cannot be read" in run(*words, status=2).stderr
