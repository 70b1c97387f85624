"""Labelled pictures to train on: handwritten digits, CIFAR-10, or a folder; splits and folds.

Everything here is a function of its arguments: the same seed gives the same pictures in the same
order, on any machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fastres.calib.images import EXTENSIONS, Preprocess
from fastres.errors import InputError

DIGITS = Path(__file__).parent / "digits" / "digits.npz"
CIFAR_CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
_RECORD = 1 + 3 * 32 * 32  # bytes: a label, then the red, green and blue planes
_WHOLE = 16  # the digits' pixels count the black dots of a 4x4 cell


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures of one size.

    Args:
        images: [N, H, W, 3] uint8, RGB.
        labels: [N] int64, each below len(classes).
        classes: the names of the labels.
        mirrors: whether a mirrored picture still belongs to its class.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    mirrors: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Pictures:
        """Those pictures alone, in that order."""
        return replace(self, images=self.images[rows], labels=self.labels[rows])


@dataclass(frozen=True)
class Data:
    """What to train on, and the pictures that its makers set apart for the test, if they did."""

    name: str
    train: Pictures
    test: Pictures | None = None


def digits(size: int = 32) -> Pictures:
    """The 1,797 handwritten digits that scikit-learn ships, 8x8, scaled up bilinearly.

    They do not mirror: a mirrored 2 is no 2, and a mirrored 5 is nearly one.

    Args:
        size: pixels of a side.

    Returns:
        1,797 pictures of size x size with ten classes, three equal channels, black ground.

    Raises:
        InputError: their file is not beside this one.

    Source: E. Alpaydin and C. Kaynak, UCI, *Optical Recognition of Handwritten Digits*.
    """
    if not DIGITS.is_file():
        raise InputError(f"there is no file {DIGITS}; README.md beside it says what makes it")
    with np.load(DIGITS) as file:
        found, labels = file["images"], file["labels"].astype(np.int64)
    grey = (found * (255 / _WHOLE)).round().astype(np.uint8)
    scaled = [np.asarray(_scaled(picture, size)) for picture in grey]
    images = np.stack(scaled)[..., None].repeat(3, axis=3)
    return Pictures(images, labels, tuple("0123456789"), mirrors=False)


def load(path: str | os.PathLike[str] | None = None, size: int = 32) -> Data:
    """The digits; or CIFAR-10's binary batches, or a folder of pictures with one folder a class.

    Args:
        path: None for the digits.
        size: pixels of a side, for the digits and for folders. CIFAR-10 has 32.

    Raises:
        InputError: there is nothing at the path, it is neither of these, or it is damaged.
    """
    if path is None:
        return Data("digits", digits(size))
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}; give one with CIFAR-10's data_batch_*.bin, or with a "
            "folder of pictures for each class"
        )
    batches = sorted(folder.glob("data_batch_*.bin"))
    if batches:
        if size != 32:
            raise InputError(f"{folder} holds CIFAR-10, which has 32 pixels a side, not {size}")
        return _cifar(folder, batches)
    if any(folder.glob("data_batch_*")):
        raise InputError(
            f"{folder} holds data_batch files that do not end in .bin: CIFAR-10 for Python, which "
            "is pickled and not read here. Take the binary version, cifar-10-binary.tar.gz"
        )
    return Data(folder.resolve().name, _folder(folder, size))


def split(labels: np.ndarray, ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, validation) with `ratio` of each class in the second, both ascending.

    Raises:
        InputError: the ratio is not between 0 and 1, or one part would be empty.
    """
    if not 0 < ratio < 1:
        raise InputError(f"the validation ratio is {ratio}; it must be between 0 and 1")
    shuffled = _shuffled_by_class(labels, seed)
    held = np.concatenate([rows[: round(len(rows) * ratio)] for rows in shuffled])
    if not 0 < len(held) < len(labels):
        raise InputError(
            f"{ratio} of {len(labels)} pictures in {len(shuffled)} classes leaves one part empty; "
            "give more pictures or another ratio"
        )
    return np.setdiff1d(np.arange(len(labels)), held), np.sort(held)


def folds(labels: np.ndarray, k: int, seed: int) -> list[np.ndarray]:
    """k disjoint sets of indices, together all of them, each with its share of every class.

    Args:
        labels: [N] int64.
        k: how many, from 2 to N.
        seed: which pictures meet.

    Returns:
        k ascending arrays of int64; the indices outside fold i are what to train on for it.

    Raises:
        InputError: k is out of range.
    """
    if not 2 <= k <= len(labels):
        raise InputError(f"{k} folds of {len(labels)} pictures; give 2 to {len(labels)}")
    # Dealt like cards, class after class, so that sizes differ by one at most.
    dealt = np.concatenate(_shuffled_by_class(labels, seed))
    return [np.sort(dealt[i::k]) for i in range(k)]


def _shuffled_by_class(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]


def _scaled(grey: np.ndarray, size: int) -> Image.Image:
    return Image.fromarray(grey).resize((size, size), Image.Resampling.BILINEAR)


def _cifar(folder: Path, batches: list[Path]) -> Data:
    train = [_cifar_batch(file) for file in batches]
    images = np.concatenate([pixels for pixels, _ in train])
    labels = np.concatenate([numbers for _, numbers in train])
    held = folder / "test_batch.bin"
    test = Pictures(*_cifar_batch(held), CIFAR_CLASSES) if held.is_file() else None
    return Data("cifar10", Pictures(images, labels, CIFAR_CLASSES), test)


def _cifar_batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    size = file.stat().st_size
    if size == 0 or size % _RECORD:
        raise InputError(
            f"{file} has {size} bytes; CIFAR-10 has {_RECORD} a picture, so the file is empty, "
            "truncated or another. Fetch it anew"
        )
    records = np.fromfile(file, np.uint8).reshape(-1, _RECORD)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= len(CIFAR_CLASSES):
        row = int(np.argmax(labels >= len(CIFAR_CLASSES)))
        raise InputError(
            f"{file}, picture {row}: label {labels[row]}; CIFAR-10 has 0 to 9. Is it CIFAR-100?"
        )
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels


def _folder(folder: Path, size: int) -> Pictures:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    if len(classes) < 2:
        raise InputError(
            f"{folder} holds {len(classes)} folders and no data_batch_*.bin; expected CIFAR-10's "
            "binary batches, or a folder of pictures for each of two or more classes"
        )
    to_size = Preprocess(resize=size, crop=size)
    images, labels = [], []
    for label, entry in enumerate(classes):
        files = sorted(f for f in entry.iterdir() if f.suffix.lower() in EXTENSIONS)
        if not files:
            raise InputError(
                f"no picture in {entry}; looked for {', '.join(sorted(EXTENSIONS))}. Put some "
                "there, or remove the folder if it is no class"
            )
        for file in files:
            try:
                images.append(to_size.pixels(file).numpy())
            except ValueError as error:
                raise InputError(str(error)) from error
            labels.append(label)
    names = tuple(entry.name for entry in classes)
    return Pictures(np.stack(images), np.array(labels, np.int64), names)
