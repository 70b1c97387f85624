"""From batches of images to a table: what each tensor of a network ranges over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from fastres.backends.reference import ReferenceExecutable
from fastres.calib.observers import Observer
from fastres.calib.oddities import Oddities
from fastres.calib.table import CalibrationTable, TensorRange
from fastres.calib.thresholds import Algorithm, thresholds
from fastres.errors import InputError
from fastres.graph.ir import Graph
from fastres.graph.passes.split_residual import split_residual
from fastres.graph.quantisable import fingerprints, observed
from fastres.options import Input
from fastres.parity.references import full_precision
from fastres.quantization.data import Batch
from fastres.quantization.data_kinds import floating_dtype, listed, taken_by, wrong_kind

_QUANTILES = (0.5, 0.9, 0.99, 0.999, 0.9999)


def collect(
    graph: Graph,
    inputs: Sequence[Input],
    batches: Iterable[Batch],
    algorithm: Algorithm,
    *,
    moved: Callable[[int], None] = lambda done: None,
    called: Callable[[int], str] = "image {}".format,
    device: torch.device | str = "cpu",
) -> CalibrationTable:
    """Runs the network over the data in fp32 and notes what each of its tensors ranges over.

    Memory hardly grows with the data: by one number for each tensor and image.

    Args:
        graph: optimised, and fed what the model is: not one that normalises pictures.
        moved: called with the number of images done.
        called: what an image is called in the table's notes, by its number.

    Raises:
        InputError: no data, a batch that does not fit the network, or values that are no numbers.
    """
    split = split_residual(graph)
    wanted = observed(split)
    seen = {name: Observer() for name in wanted}
    executable = ReferenceExecutable(split, torch.float32, device)
    oddities = Oddities()
    images = 0
    for batch in batches:
        check_batch(batch, inputs, images)

        def see(name: str, value: torch.Tensor) -> None:
            if name in seen:
                _observe(seen[name], name, value)

        given = [_channels_last(x.to(device, torch.float32)) for x in batch]
        with full_precision():
            executable.visit(given, see)
        oddities.add(given[0])
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
        notes=oddities.notes({name: o.largest_of_each for name, o in seen.items()}, called),
    )


def _observe(observer: Observer, name: str, value: torch.Tensor) -> None:
    try:
        observer.add(value)
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


def check_batch(batch: Batch, inputs: Sequence[Input], images: int) -> None:
    """
    Raises:
        InputError: a batch is not what the network takes.
    """
    for x, entry in zip(batch, inputs, strict=True):
        fits = taken_by(entry)
        if not fits(tuple(x.shape)) or not x.is_floating_point():
            why = wrong_kind(x, fits)
            raise InputError(
                f"the calibration data has {listed([x])} after {images} images; the network takes "
                f"floating-point [N, {', '.join(map(str, entry.usual[1:]))}]"
                f"{f': {why}' if why else ''}"
            )


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def shapes_of(model: torch.nn.Module, batch: Batch) -> tuple[Input, ...]:
    """Inputs as the first batch has them, in what the model computes in."""
    return tuple(
        Input((max(1, len(x)), *x.shape[1:]), dtype=floating_dtype(model, x.dtype)) for x in batch
    )
