"""From calibration data to a table: batches out of whatever holds images, ranges out of batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastres.backends.reference import ReferenceExecutable
from fastres.calib.images import Preprocess, find_images
from fastres.calib.images import batches as picture_batches
from fastres.calib.observers import Observer
from fastres.calib.table import CalibrationTable, TensorRange
from fastres.calib.thresholds import Algorithm, thresholds
from fastres.errors import InputError
from fastres.graph.ir import Graph
from fastres.graph.passes.split_residual import split_residual
from fastres.graph.quantisable import fingerprints, observed
from fastres.options import Input
from fastres.references import full_precision
from fastres.weights import oddity

Batch = tuple[torch.Tensor, ...]
Data = torch.Tensor | np.ndarray | str | os.PathLike[str] | Iterable[Any]
BATCH = 8  # images of a tensor or of a folder that run at a time
_QUANTILES = (0.5, 0.9, 0.99, 0.999, 0.9999)


class Batches:
    """Up to `samples` images, batch by batch, to be gone through once or several times.

    Args:
        data: a tensor or an array [N, C, H, W]; a folder of images, or one image; or an iterable of
            batches, such as a DataLoader: each a tensor, or a sequence that starts with one (labels
            may follow).
        samples: how many to take: by chance of a tensor and of a folder, the first of an iterable.
        inputs: of the model; 1 unless it takes several tensors, which are then what a batch of an
            iterable starts with.
        preprocess: how files become inputs.
        seed: of the chance.

    Raises:
        InputError: data is none of these, or files without a preprocess.
    """

    def __init__(
        self, data: Data, samples: int, *, inputs: int, preprocess: Preprocess | None, seed: int
    ) -> None:
        self.samples = samples
        self._inputs = inputs
        if isinstance(data, str | os.PathLike):
            if preprocess is None:
                raise InputError(
                    f"data is the path {os.fspath(data)}: say how its images become inputs, by "
                    "preprocess=Preprocess(...)"
                )
            try:
                files = find_images(data)
            except ValueError as error:
                raise InputError(str(error)) from error
            chosen = [files[i] for i in _some(len(files), samples, seed)]
            self._source: Iterable[Any] = _Files(chosen, preprocess)
        elif isinstance(data, torch.Tensor | np.ndarray):
            rows = _tensor(data)
            if rows.dim() == 0:
                raise InputError("data is a single number; give images, [N, C, H, W]")
            self._source = _Rows(rows, _some(len(rows), samples, seed))
        elif isinstance(data, Iterable):
            self._source = data
        else:
            raise InputError(
                f"data is {type(data).__name__}; give a tensor, an array, a folder of images, or "
                "an iterable of batches"
            )

    def __iter__(self) -> Iterator[Batch]:
        """Raises InputError for what cannot be calibrated with; names the batch."""
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
        parts = list(item) if isinstance(item, tuple | list) else [item]
        found = []
        for part in parts[: self._inputs]:
            tensor = _tensor(part)
            if odd := oddity(tensor):
                raise InputError(
                    f"batch {number} of the calibration data holds {odd}; give tensors or arrays"
                )
            found.append(tensor.detach())
        if len(found) < self._inputs or not found[0].dim() or not len(found[0]):
            raise InputError(
                f"batch {number} of the calibration data is {[list(x.shape) for x in found]}; the "
                f"model takes {self._inputs} inputs, batch first and not empty"
            )
        return tuple(found)


def _tensor(given: Any) -> Any:
    """An array as a tensor; all else as it is.

    Raises:
        InputError: an array of something that is no number.
    """
    if not isinstance(given, np.ndarray):
        return given
    try:
        return torch.from_numpy(given)
    except TypeError as error:
        raise InputError(f"an array of {given.dtype} is no data; give floating point") from error


class _Rows:
    def __init__(self, rows: torch.Tensor, chosen: Sequence[int]) -> None:
        self._rows, self._chosen = rows, chosen

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self._chosen), BATCH):
            yield self._rows[list(self._chosen[start : start + BATCH])]


class _Files:
    def __init__(self, files: Sequence[Path], preprocess: Preprocess) -> None:
        self._files, self._preprocess = files, preprocess

    def __iter__(self) -> Iterator[torch.Tensor]:
        return picture_batches(self._files, self._preprocess, BATCH)


def _some(count: int, samples: int, seed: int) -> list[int]:
    """Which of `count` to take, in their order."""
    chance = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(count, generator=chance)[:samples].tolist())


def first_of(batches: Iterable[Batch]) -> tuple[Batch, Iterable[Batch]]:
    """The first batch, and all of them, when they can be gone through only once.

    Raises:
        InputError: there is none.
    """
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise InputError("the calibration data is empty; give at least one image")
    return first, chain([first], rest)


def collect(
    graph: Graph,
    inputs: Sequence[Input],
    batches: Iterable[Batch],
    algorithm: Algorithm,
    *,
    moved: Callable[[int], None] = lambda done: None,
    device: torch.device | str = "cpu",
) -> CalibrationTable:
    """Runs the network over the data in fp32 and notes what each of its tensors ranges over.

    Memory does not grow with the data.

    Args:
        graph: optimised, and fed what the model is: not one that normalises pictures.
        moved: called with the number of images done.

    Raises:
        InputError: no data, a batch that does not fit the network, or values that are no numbers.
    """
    split = split_residual(graph)
    wanted = observed(split)
    seen = {name: Observer() for name in wanted}
    executable = ReferenceExecutable(split, torch.float32, device)
    images = 0
    for batch in batches:
        _check(batch, inputs, images)

        def see(name: str, value: torch.Tensor) -> None:
            if name in seen:
                _observe(seen[name], name, value)

        given = [_channels_last(x.to(device, torch.float32)) for x in batch]
        with full_precision():
            executable.visit(given, see)
        images += len(batch[0])
        moved(images)
    if not images:
        raise InputError("the calibration data is empty; give at least one image")
    structure, weights = fingerprints(graph)
    return CalibrationTable(
        algorithm=algorithm,
        samples=images,
        graph=structure,
        weights=weights,
        tensors={
            name: _range(observer, with_means=wanted[name]) for name, observer in seen.items()
        },
    )


def _observe(observer: Observer, name: str, value: torch.Tensor) -> None:
    try:
        observer.add(value if value.dim() in (2, 4) else value.flatten(0, -2))
    except ValueError as error:
        raise InputError(
            f"{name} cannot be calibrated: {error}. Check the data, and the model in fp32"
        ) from error


def _range(observer: Observer, with_means: bool) -> TensorRange:
    histogram = observer.histogram
    return TensorRange(
        largest=float(np.float32(histogram.largest)),
        thresholds=thresholds(histogram),
        quantiles={
            f"{share:g}": float(np.float32(histogram.quantile(share))) for share in _QUANTILES
        },
        means=tuple(observer.means.tolist()) if with_means else (),
    )


def _check(batch: Batch, inputs: Sequence[Input], images: int) -> None:
    """Raises InputError where a batch is not what the network takes."""
    for x, entry in zip(batch, inputs, strict=True):
        sizes = tuple(x.shape[1:])
        fits = len(x.shape) == len(entry.usual) and all(
            low <= size <= high
            for low, size, high in zip(entry.smallest[1:], sizes, entry.largest[1:], strict=True)
        )
        if not fits or not x.is_floating_point():
            raise InputError(
                f"the calibration data has {x.dtype}{list(x.shape)} after {images} images; the "
                f"network takes floating-point [N, {', '.join(map(str, entry.usual[1:]))}]"
            )


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def shapes_of(batch: Batch) -> tuple[Input, ...]:
    """Inputs as the first batch has them."""
    return tuple(Input((max(1, len(x)), *x.shape[1:]), dtype=x.dtype) for x in batch)
