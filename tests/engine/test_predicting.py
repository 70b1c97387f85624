"""engine.predict: every picture gets its own answer, or a word on why it has none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

import fastres
from fastres import Input, Prediction, Preprocess, models
from fastres.errors import InputError

P = Preprocess(resize=36, crop=32)


@pytest.fixture(scope="module", params=[None, torch.uint8], ids=["floats", "bytes"])
def engine(request: pytest.FixtureRequest) -> Any:
    net = models.cifar_resnet(8, seed=0).eval()
    with fastres.compile(
        net, Input((1, 3, 32, 32)), backend="reference", preprocess=P, io_dtype=request.param
    ) as made:
        yield made


def noise(seed: int, size: tuple[int, int] = (40, 44)) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture
def forty(tmp_path: Path) -> list[Any]:
    """Paths and pictures, of which some cannot be taken: those of `BAD`."""
    images: list[Any] = [noise(i) for i in range(40)]
    for i in range(0, 40, 2):
        images[i].save(tmp_path / f"{i}.png")
        images[i] = tmp_path / f"{i}.png"
    (tmp_path / "text.jpg").write_text("no picture")
    os.mkfifo(tmp_path / "pipe.jpg")
    images[0], images[26], images[39] = tmp_path / "text.jpg", tmp_path / "pipe.jpg", 5
    images[17] = Image.new("F", (9, 9))
    return images


BAD = {0: "text.jpg", 17: "image 17: ", 26: "pipe.jpg", 39: "image 39: "}


@pytest.mark.parametrize("batch_size", [1, 8, 13, 64])
def test_one_bad_picture_loses_no_answers(
    engine: fastres.Engine, forty: list[Any], batch_size: int
) -> None:
    found = engine.predict(forty, batch_size=batch_size, top_k=3, on_error="row")
    assert len(found) == 40
    for i, (image, row) in enumerate(zip(forty, found, strict=True)):
        if i in BAD:
            assert row.classes == row.probabilities == () and BAD[i] in row.error
        else:
            (alone,) = engine.predict([image], top_k=3)
            assert row.error == "" and row.classes == alone.classes
            assert row.probabilities == pytest.approx(alone.probabilities, rel=1e-4)


def test_else_the_first_of_them_is_named(engine: fastres.Engine, forty: list[Any]) -> None:
    for number, name in BAD.items():
        with pytest.raises(InputError, match=name):
            engine.predict(
                [image for i, image in enumerate(forty) if i == number or i not in BAD]
                if isinstance(forty[number], Path)
                else [noise(0)] * number + [forty[number]]
            )
    with pytest.raises(InputError, match="on_error is 'skip'; give 'raise', or 'row' to go on"):
        engine.predict(forty, on_error="skip")  # type: ignore[arg-type]


def test_nothing_but_bad_ones_and_nothing_at_all(engine: fastres.Engine) -> None:
    assert engine.predict([], on_error="row") == []
    assert all(row.error for row in engine.predict([1, 2], on_error="row"))  # type: ignore[list-item]
    assert Prediction((1,), (0.5,)).error == ""


def test_pictures_of_other_sizes(engine: fastres.Engine) -> None:
    engine.preprocess = msgspec.structs.replace(P, resize=None, crop=None)
    images = [noise(0, (32, 32)), noise(1, (32, 40)), noise(2, (32, 32))]
    first, other, last = engine.predict(images, on_error="row")
    assert first.classes and last.classes
    assert "image 1 is" in other.error and "40" in other.error and "expected [N, " in other.error
    with pytest.raises(InputError, match=r"image 1 is .*40.* after preprocessing, expected \[N, "):
        engine.predict(images)
    engine.preprocess = P


def test_an_engine_of_several_sizes_takes_them_together() -> None:
    net = models.cifar_resnet(8, seed=0).eval()
    given = Preprocess(resize=None, crop=None)
    ranged = Input(((1, 3, 24, 24), (1, 3, 32, 32), (8, 3, 48, 48)))
    with fastres.compile(net, ranged, backend="reference", preprocess=given) as engine:
        sizes = [(32, 32), (24, 40), (32, 32), (16, 16), (24, 40)]
        images = [noise(i, size) for i, size in enumerate(sizes)]
        found = engine.predict(images, on_error="row")
        assert [bool(row.error) for row in found] == [False, False, False, True, False]
        for image, row in zip(images, found, strict=True):
            if not row.error:
                assert engine.predict([image])[0].classes == row.classes


def test_how_pictures_are_turned_is_saved(engine: fastres.Engine, tmp_path: Path) -> None:
    """Engines saved before there was the choice turned none; and the limit is the caller's."""
    for exif in (True, False):
        engine.preprocess = msgspec.structs.replace(P, exif=exif, max_pixels=5000)
        engine.save(tmp_path / "e")
        assert (b"exif" in (tmp_path / "e" / "manifest.json").read_bytes()) == exif
        with fastres.load(tmp_path / "e") as loaded:
            assert loaded.preprocess == msgspec.structs.replace(P, exif=exif)
    engine.preprocess = P
