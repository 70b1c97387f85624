"""examples/datasets.py and corruptions.py: repeatable, disjoint, plain about damage."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
from corruptions import KINDS, corrupted
from datasets import DIGITS, Pictures, digits, folds, load, split
from PIL import Image
from sklearn.datasets import load_digits

from fastres.errors import InputError


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return digits()


def cifar(folder: Path, name: str, labels: list[int]) -> np.ndarray:
    """A batch of random pictures as CIFAR-10 has them; returns them as [N, 32, 32, 3]."""
    images = np.random.default_rng(len(labels)).integers(256, size=(len(labels), 32, 32, 3))
    rows = [
        bytes([label]) + b"".join(image[..., c].astype(np.uint8).tobytes() for c in range(3))
        for label, image in zip(labels, images, strict=True)
    ]
    (folder / name).write_bytes(b"".join(rows))
    return images


def folder_of(root: Path, **colours: tuple[int, int, int]) -> Path:
    for name, colour in colours.items():
        (root / name).mkdir()
        Image.new("RGB", (50, 40), colour).save(root / name / "one.png")
    return root


def test_digits(pictures: Pictures) -> None:
    assert pictures.images.shape == (1797, 32, 32, 3) and pictures.images.dtype == np.uint8
    assert pictures.labels.dtype == np.int64 and set(pictures.labels) == set(range(10))
    assert pictures.images.min() == 0 and pictures.images.max() == 255
    assert (pictures.images[..., 0] == pictures.images[..., 2]).all()
    assert not pictures.mirrors


def test_digits_are_those_of_scikit_learn() -> None:
    found = load_digits()
    with np.load(DIGITS) as file:
        assert np.array_equal(file["images"], found.images)
        assert np.array_equal(file["labels"], found.target)


def test_digits_without_their_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets, "DIGITS", tmp_path / "none.npz")
    with pytest.raises(InputError, match="no file .*none.npz; README.md beside it says"):
        digits()


def test_folds_are_disjoint_stratified_and_the_same_every_time(pictures: Pictures) -> None:
    labels = pictures.labels
    found = folds(labels, 5, seed=3)
    assert np.array_equal(np.sort(np.concatenate(found)), np.arange(len(labels)))
    assert {len(fold) for fold in found} == {359, 360}
    counts = np.array([np.bincount(labels[fold], minlength=10) for fold in found])
    assert (np.ptp(counts, axis=0) <= 1).all()
    for one, same, other in zip(found, folds(labels, 5, 3), folds(labels, 5, 4), strict=True):
        assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_split_holds_out_its_share_of_each_class(pictures: Pictures) -> None:
    rows, held = split(pictures.labels, 0.2, seed=0)
    assert np.array_equal(np.sort(np.concatenate([rows, held])), np.arange(1797))
    whole, part = np.bincount(pictures.labels), np.bincount(pictures.labels[held])
    assert (np.abs(part - 0.2 * whole) <= 0.5).all()
    assert np.array_equal(held, split(pictures.labels, 0.2, seed=0)[1])
    assert not np.array_equal(held, split(pictures.labels, 0.2, seed=1)[1])


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 0.001])
def test_impossible_splits(ratio: float) -> None:
    with pytest.raises(InputError, match="ratio|leaves one part empty"):
        split(np.arange(10) % 2, ratio, 0)


@pytest.mark.parametrize("k", [1, 11])
def test_impossible_folds(k: int) -> None:
    with pytest.raises(InputError, match="give 2 to 10"):
        folds(np.arange(10) % 2, k, 0)


def test_cifar(tmp_path: Path) -> None:
    first = cifar(tmp_path, "data_batch_1.bin", [3, 9])
    second = cifar(tmp_path, "data_batch_2.bin", [0])
    held = cifar(tmp_path, "test_batch.bin", [7, 1, 5])
    data = load(tmp_path)
    assert np.array_equal(data.train.images, np.concatenate([first, second]))
    assert data.train.labels.tolist() == [3, 9, 0] and data.train.classes[3] == "cat"
    assert data.test is not None and np.array_equal(data.test.images, held)
    assert data.train.mirrors


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    data = load(folder_of(tmp_path, sky=(0, 0, 200), grass=(0, 180, 0)), size=16)
    assert data.train.images.shape == (2, 16, 16, 3)
    assert data.train.classes == ("grass", "sky") and data.train.labels.tolist() == [0, 1]
    assert data.train.images[1, 8, 8].tolist() == [0, 0, 200]


def test_unusable_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder .*nowhere; give one with"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds 0 folders"):
        load(tmp_path)
    folder_of(tmp_path, red=(200, 0, 0))
    with pytest.raises(InputError, match="holds 1 folders"):
        load(tmp_path)
    (tmp_path / "blue").mkdir()
    with pytest.raises(InputError, match="no picture in .*blue"):
        load(tmp_path)
    (tmp_path / "blue" / "half.png").write_bytes((tmp_path / "red" / "one.png").read_bytes()[:60])
    with pytest.raises(InputError, match="half.png cannot be read"):
        load(tmp_path)


def test_damaged_cifar(tmp_path: Path) -> None:
    file = tmp_path / "data_batch_1"
    file.write_bytes(b"\x80\x02}q")
    with pytest.raises(InputError, match="binary version"):
        load(tmp_path)
    file = tmp_path / "data_batch_1.bin"
    for size in (0, 3072, 3074):
        file.write_bytes(bytes(size))
        with pytest.raises(InputError, match=f"_1.bin has {size} bytes; CIFAR-10 has 3073"):
            load(tmp_path)
    cifar(tmp_path, file.name, [1, 77])
    with pytest.raises(InputError, match="picture 1: label 77"):
        load(tmp_path)
    cifar(tmp_path, file.name, [1, 7])
    with pytest.raises(InputError, match="32 pixels a side, not 64"):
        load(tmp_path, size=64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_corruption_changes_every_picture_and_is_the_same_every_time(
    kind: str, pictures: Pictures
) -> None:
    images = pictures.images[:60]
    before = images.copy()
    found = corrupted(images, kind, 0)
    assert found.shape == images.shape and found.dtype == np.uint8
    assert np.array_equal(images, before)
    assert (found != images).any(axis=(1, 2, 3)).all()
    assert np.array_equal(found, corrupted(images, kind, 0))
    assert not np.array_equal(found, corrupted(images, kind, 1))
    assert not len(corrupted(images[:0], kind, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_corruptions_of_other_sizes(kind: str) -> None:
    images = np.random.default_rng(0).integers(256, size=(3, 20, 50, 3), dtype=np.uint8)
    assert corrupted(images, kind, 0).shape == images.shape


def test_wrong_corruptions(pictures: Pictures) -> None:
    with pytest.raises(InputError, match="no corruption 'rain'; there are shift, rotate"):
        corrupted(pictures.images, "rain", 0)
    with pytest.raises(InputError, match=r"float64\[2, 32, 32, 3\]; expected uint8"):
        corrupted(pictures.images[:2] / 255, "shift", 0)
