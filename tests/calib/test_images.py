"""From picture to tensor, against torchvision's transforms; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fastres.calib.decoding import decode
from fastres.calib.images import Preprocess, batches, find_images


def torchvision_pipeline(resize: int, crop: int) -> v2.Compose:
    return v2.Compose(
        [
            v2.Resize(resize, antialias=True),
            v2.CenterCrop(crop),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (232, 224), (64, 64), (50, 33)])
def test_same_as_torchvision(pictures: tuple[Image.Image, ...], resize: int, crop: int) -> None:
    ours, theirs = Preprocess(resize=resize, crop=crop), torchvision_pipeline(resize, crop)
    for picture in pictures:
        got, want = ours(picture), theirs(picture)
        assert got.shape == (3, crop, crop) and got.dtype == torch.float32
        assert torch.allclose(got, want, atol=1e-6)


def test_pixels_alone(pictures: tuple[Image.Image, ...]) -> None:
    """As far as the last step but one, in RGB whatever order the network wants."""
    resize = v2.Compose([v2.Resize(50, antialias=True), v2.CenterCrop(33)])
    p = Preprocess(resize=50, crop=33, channels="BGR")
    (got,) = batches(pictures, p, 3, normalise=False)
    assert got.dtype == torch.uint8 and got.shape == (3, 33, 33, 3)
    for pixels, picture in zip(got, pictures, strict=True):
        assert torch.equal(pixels, torch.from_numpy(np.array(resize(picture))))


def test_channel_order_and_scale() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[..., 0] = 200
    plain = Preprocess(resize=None, crop=None, mean=(0, 0, 0), std=(1, 1, 1), scale=1.0)
    assert plain(pixels)[:, 0, 0].tolist() == [200, 0, 0]
    caffe = Preprocess(
        resize=None, crop=None, mean=(1, 2, 3), std=(1, 1, 2), scale=1.0, channels="BGR"
    )
    assert caffe(pixels)[:, 0, 0].tolist() == [-1, -2, 98.5]


def test_paths_arrays_and_pictures_agree(tmp_path: Path, pictures: tuple[Image.Image, ...]) -> None:
    file = tmp_path / "a.png"
    pictures[0].save(file)
    x = Preprocess()(pictures[0])
    assert torch.equal(Preprocess()(file), x) and torch.equal(Preprocess()(str(file)), x)
    assert torch.equal(Preprocess()(np.asarray(pictures[0])), x)
    assert decode(pictures[0].convert("L")).mode == "RGB"


def test_batches_and_folders(tmp_path: Path, pictures: tuple[Image.Image, ...]) -> None:
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    found = find_images(tmp_path)
    assert [p.name for p in found] == ["0.jpg", "1.jpg", "2.jpg"]
    assert find_images(found[0]) == [found[0]]
    assert [b.shape[0] for b in batches(found, Preprocess(), 2)] == [2, 1]


def test_what_is_refused(tmp_path: Path, pictures: tuple[Image.Image, ...]) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff no jpeg")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        Preprocess()(broken)
    with pytest.raises(ValueError, match="there is no file"):
        Preprocess()(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"the array is float32\[4, 4, 3\]"):
        Preprocess()(np.zeros((4, 4, 3), np.float32))
    for wrong in (5, None, b"photo.jpg"):
        with pytest.raises(
            ValueError, match=f"an image is {type(wrong).__name__}; expected a path"
        ):
            Preprocess()(wrong)  # type: ignore[arg-type]
    for empty in (np.zeros((0, 0, 3), np.uint8), Image.new("RGB", (0, 4))):
        with pytest.raises(ValueError, match="it has no pixels"):
            Preprocess()(empty)
    with pytest.raises(ValueError, match="smaller than the crop"):
        Preprocess(resize=100, crop=224)(pictures[0])
    with pytest.raises(ValueError, match="the images differ in size"):
        Preprocess(resize=None, crop=None).batch([pictures[1], pictures[1].rotate(90, expand=True)])
    with pytest.raises(ValueError, match="no image below"):
        find_images(_empty(tmp_path))
    with pytest.raises(ValueError, match="there is no file or folder"):
        find_images(tmp_path / "nowhere")


def _empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    "settings",
    [{"resize": 0}, {"crop": -1}, {"std": (1, 0, 1)}, {"channels": "RGBA"}, {"interpolation": "x"}],
)
def test_bad_settings(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Preprocess(**settings)


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    found = np.asarray(decode(tmp_path / "deep.png"))
    assert np.array_equal(found, np.repeat((grey // 257).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_with_a_range_of_their_own_are_refused(dtype: type, tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "odd.tiff")
    with pytest.raises(ValueError, match="scale them to 8 or 16 bits first"):
        decode(tmp_path / "odd.tiff")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": 0.5}, "mean is 0.5; give three finite numbers"),
        ({"mean": None}, "mean is None"),
        ({"std": (1.0, 1.0)}, r"std is \(1.0, 1.0\); give three"),
        ({"mean": (0.0, float("nan"), 0.0)}, "mean is .*nan"),
        ({"std": (1.0, 0.0, 1.0)}, "every entry must be above 0"),
        ({"scale": 0}, "scale is 0; give a finite number other than 0"),
        ({"scale": "1"}, "scale is '1'"),
        ({"mean": (True, False, False)}, "mean is .*True"),
        ({"mean": (10**400, 0, 0)}, "mean is "),
        ({"resize": "a"}, "resize is 'a'; it must be an integer of 1 to 65536, or None"),
        ({"resize": 32.5}, "resize is 32.5"),
        ({"crop": True}, "crop is True"),
        ({"crop": 2**40}, "crop is "),
        ({"interpolation": []}, "supported are"),
    ],
    ids=str,
)
def test_numbers_that_do_not_normalise(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**fields)


def test_numbers_become_those_of_json() -> None:
    made = Preprocess(mean=np.float32([0.5, 0.25, 0]).tolist(), std=(1, 2, np.float32(4)), scale=1)  # type: ignore[arg-type]
    assert made.std == (1.0, 2.0, 4.0) and made.mean == (0.5, 0.25, 0.0)
    assert msgspec.json.decode(msgspec.json.encode(made), type=Preprocess) == made
