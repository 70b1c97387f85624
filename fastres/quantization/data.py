"""Calibration data: batches out of whatever holds images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fastres.calib.decoding import is_picture
from fastres.calib.images import ImageLike, Preprocess, find_images
from fastres.calib.images import batches as picture_batches
from fastres.errors import InputError
from fastres.quantization.data_kinds import listed
from fastres.weights import oddity

Batch = tuple[torch.Tensor, ...]
Data = torch.Tensor | np.ndarray | str | os.PathLike[str] | Iterable[Any]
BATCH = 8  # images of a tensor or of a folder that run at a time
_WHERE = "of the calibration data"
_PICTURES = "say how pictures become inputs, by preprocess=Preprocess(...)"


class Batches:
    """Up to `samples` images, batch by batch, to be gone through once or several times.

    Args:
        data: a tensor or an array [N, C, H, W]; a folder of images, or one image, or a list of
            pictures; or an iterable of batches, such as a DataLoader: each a tensor, a sequence
            that starts with one (labels may follow), or a dict that has one under the input's name.
        samples: how many to take: by chance of a tensor and of pictures, the first of an iterable.
        inputs: of the model; 1 unless it takes several tensors, which are then what a batch of an
            iterable starts with.
        preprocess: how pictures become inputs.
        seed: of the chance.
        names: of the inputs, in order, by which a batch that is a dict is read.

    Raises:
        InputError: data is none of these, or pictures without a preprocess.
    """

    def __init__(
        self,
        data: Data,
        samples: int,
        *,
        inputs: int,
        preprocess: Preprocess | None,
        seed: int,
        names: Sequence[str] = (),
    ) -> None:
        self.samples = samples
        self._inputs, self._names = inputs, tuple(names)[:inputs]
        self._head: Batch | None = None
        self._rest: Iterator[Batch] = iter(())
        self._chosen: list[Any] = []
        pictures = _pictures(data)
        if pictures is not None:
            if preprocess is None:
                raise InputError(f"the calibration data is {_called(data)}: {_PICTURES}")
            self._chosen = [pictures[i] for i in _some(len(pictures), samples, seed)]
            self._source: Iterable[Any] = _Pictures(self._chosen, preprocess)
        elif isinstance(data, torch.Tensor | np.ndarray):
            rows = _tensor(data)
            if odd := oddity(rows):
                raise InputError(f"the calibration data is {odd}; give floating point [N, C, H, W]")
            if rows.dim() == 0:
                raise InputError("the calibration data is a single number; give [N, C, H, W]")
            self._chosen = _some(len(rows), samples, seed)
            self._source = _Rows(rows, self._chosen)
        elif isinstance(data, Dataset) and not isinstance(data, Iterable):
            raise InputError(
                f"the calibration data is {type(data).__name__}, a dataset of single images; give "
                "batches of them: DataLoader(dataset, batch_size=8)"
            )
        elif isinstance(data, Iterable) and not isinstance(data, Mapping):
            self._source = data
        else:
            raise InputError(
                f"the calibration data is {type(data).__name__}; give a tensor, an array, a folder "
                "of images, or an iterable of batches, such as [batch]"
            )

    def first(self) -> Batch:
        """The first batch, which the next iteration still begins with.

        Raises:
            InputError: there is none, or it is no batch.
        """
        if self._head is None:
            self._rest = self._read()
            self._head = next(self._rest, None)
        if self._head is None:
            raise InputError(
                "the calibration data is empty; give at least one image (a generator that was gone "
                "through before is used up)"
            )
        return self._head

    def __iter__(self) -> Iterator[Batch]:
        """Raises InputError for what cannot be calibrated with; names the batch."""
        head, self._head = self._head, None
        return self._read() if head is None else chain([head], self._rest)

    def called(self, image: int) -> str:
        """How messages call the image that came as this one, counted from 0."""
        if image >= len(self._chosen):
            return f"image {image}"
        found = self._chosen[image]
        return os.fspath(found) if isinstance(found, str | os.PathLike) else f"image {found}"

    def _read(self) -> Iterator[Batch]:
        left = self.samples
        try:
            for number, item in enumerate(self._source):
                if left <= 0:
                    return
                batch = self._batch(item, number)
                batch = tuple(x[:left] for x in batch)
                left -= len(batch[0])
                yield batch
        except ValueError as error:  # an image that cannot be read
            raise error if isinstance(error, InputError) else InputError(str(error)) from error

    def _batch(self, item: Any, number: int) -> Batch:
        parts = self._parts(item, number)
        found = []
        for part in parts[: self._inputs]:
            tensor = _tensor(part)
            if isinstance(part, str | os.PathLike) or is_picture(part):
                raise InputError(
                    f"batch {number} {_WHERE} is {_called(part)}: give a list of pictures alone, "
                    f"and {_PICTURES}"
                )
            if odd := oddity(tensor):
                raise InputError(f"batch {number} {_WHERE} holds {odd}; give tensors or arrays")
            found.append(tensor.detach())
        if len(found) < self._inputs or not found[0].dim() or not len(found[0]):
            raise InputError(
                f"batch {number} {_WHERE} is {[list(x.shape) for x in found]}; the model takes "
                f"{self._inputs} inputs, batch first and not empty"
            )
        later = [x for x in parts[1:] if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if found[0].dim() == 1 and not found[0].is_floating_point() and later:
            raise InputError(
                f"batch {number} {_WHERE} is {listed([found[0], *later])}: labels, and then "
                "images; give images first"
            )
        return tuple(found)

    def _parts(self, item: Any, number: int) -> list[Any]:
        """What a batch is made of; of a dict, the inputs by their names."""
        several = isinstance(item, tuple | list)
        named = item[0] if several and len(item) and isinstance(item[0], Mapping) else item
        if not isinstance(named, Mapping):
            return list(item) if several else [item]
        if not self._names or not set(self._names) <= set(named):
            there = ", ".join(map(str, named)) or "nothing"
            raise InputError(
                f"batch {number} {_WHERE} is a dict with {there}; the model's inputs are called "
                f"{', '.join(self._names) or 'nothing'}: give tensors, such as [batch[KEY] for "
                "batch in data]"
            )
        return [named[name] for name in self._names]


class _Rows:
    def __init__(self, rows: torch.Tensor, chosen: Sequence[int]) -> None:
        self._rows, self._chosen = rows, chosen

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self._chosen), BATCH):
            yield self._rows[list(self._chosen[start : start + BATCH])]


class _Pictures:
    def __init__(self, pictures: Sequence[ImageLike], preprocess: Preprocess) -> None:
        self._pictures, self._preprocess = pictures, preprocess

    def __iter__(self) -> Iterator[torch.Tensor]:
        return picture_batches(self._pictures, self._preprocess, BATCH)


def _pictures(data: object) -> Sequence[ImageLike] | None:
    """The pictures that a path stands for, or a list holds; None for other data."""
    if isinstance(data, str | os.PathLike):
        try:
            return find_images(data)
        except ValueError as error:
            raise InputError(f"the calibration data: {error}") from error
    if is_picture(data):
        return [data]
    if not isinstance(data, list | tuple) or not data:
        return None
    return data if all(isinstance(d, str | os.PathLike) or is_picture(d) for d in data) else None


def _called(data: object) -> str:
    if isinstance(data, str | os.PathLike):
        return f"the path {os.fspath(data)}"
    if is_picture(data):
        return f"a picture, {type(data).__name__}"
    return f"a {type(data).__name__} of pictures or of paths"


def _tensor(given: Any) -> Any:
    """An array as a tensor; all else as it is.

    Raises:
        InputError: an array of something that is no number.
    """
    if not isinstance(given, np.ndarray):
        return given
    try:
        return torch.from_numpy(np.ascontiguousarray(given) if given.ndim else given)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the calibration data is an array of {given.dtype}, which is no data; give floating "
            "point [N, C, H, W]"
        ) from error


def _some(count: int, samples: int, seed: int) -> list[int]:
    """Which of `count` to take, in their order."""
    chance = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(count, generator=chance)[:samples].tolist())
