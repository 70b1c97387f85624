"""fastres.quantize: a calibration table, its algorithm, and the layers that stay out of int8."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

import msgspec
import torch
from torch.export import ExportedProgram

from fastres.assembly.assemble import optimised
from fastres.calib.images import Preprocess
from fastres.calib.table import CalibrationTable
from fastres.calib.thresholds import ALGORITHMS, Algorithm
from fastres.errors import CaptureError, InputError
from fastres.graph.ir import Graph
from fastres.graph.kinds import accepted
from fastres.options import EIGHT_BITS, Input, PathLike, Precision, integer, is_number
from fastres.quantization.calibrate import check_batch, collect, shapes_of
from fastres.quantization.data import Batch, Batches, Data
from fastres.quantization.data_kinds import listed, runs_in, wrong_kind
from fastres.quantization.search import Network, Search, Validate, remembering
from fastres.source import Inputs, Model, Source, given_inputs, inputs_of, source_of
from fastres.text import progress_bar

Calibration = CalibrationTable | PathLike | Iterable[Any]
DEFAULT: Algorithm = "mse"
SAMPLES = 512


def quantize(
    model: Model,
    data: Data,
    *,
    algorithm: Algorithm | Literal["auto"] = "auto",
    num_samples: int = SAMPLES,
    ignored: Collection[str] = (),
    validate: Validate | None = None,
    max_drop: float | None = None,
    seed: int = 0,
    inputs: Inputs | None = None,
    preprocess: Preprocess | None = None,
    backend: str | Sequence[str] = "auto",
) -> CalibrationTable:
    """Calibrates a model for int8, and finds out what must not be quantised.

    Every tensor that a convolution, a linear layer or a residual addition reads is observed in
    fp32, and gets the threshold at which int8 saturates; what for is in `fastres.calib.thresholds`.

    Args:
        model: as `fastres.compile` takes it.
        data: images like those in use: a tensor or an array [N, C, H, W], a folder of images (with
            `preprocess`), or an iterable of batches, such as a DataLoader: each a tensor, a
            sequence that begins with one, or a dict that has one under the name of the model's
            input. Any floating-point dtype is taken.
        algorithm: "minmax", "percentile" (99.99), "percentile-99.9", "entropy" or "mse". "auto"
            takes the one with which `validate` gives most; without that, the one with the highest
            SQNR of an image's outputs: the median of the first 32 images.
        num_samples: images to look at; a few hundred are enough.
        ignored: layers that stay in floating point, by name or pattern, such as "layer4.*".
        validate: takes an engine and returns its accuracy, the more the better.
        max_drop: how much of it int8 may cost, in the same unit, such as 0.003: layers are left in
            floating point, the most sensitive first, until it costs no more. Needs `validate`.
        seed: which images are drawn from a tensor or a folder.
        inputs: as for `fastres.compile`; None takes the data's first batch as the example.
        preprocess: how files become inputs.
        backend: that runs the engines for `validate`.

    Returns:
        A table for `fastres.compile(model, calibration=table)`; `table.keep` names the layers left
        in floating point, `table.curve` the accuracies, `table.notes` the images that are far from
        the rest. The same data and seed give the same bytes on the same machine and versions.

    Raises:
        InputError: an argument is out of range; the data is empty, of the wrong kind (said before
            the model is exported), or makes a tensor hold NaN or infinities (named).
        CaptureError: as `fastres.compile`.
    """
    if algorithm not in ("auto", *ALGORITHMS):
        known = ", ".join(map(repr, ("auto", *ALGORITHMS)))
        raise InputError(f"algorithm is {algorithm!r}; supported are {known}")
    if max_drop is not None and not (is_number(max_drop) and max_drop >= 0):
        raise InputError(f"max_drop is {max_drop!r}; it must be a number of at least 0, or None")
    if max_drop is not None and validate is None:
        raise InputError(
            "max_drop needs validate=: a function that takes an engine and returns its accuracy"
        )
    if validate is not None and not callable(validate):
        raise InputError(f"validate is {type(validate).__name__}; give a function of an engine")
    num_samples, seed = integer("num_samples", num_samples), integer("seed", seed, least=0)
    model = accepted(model)
    batches = _opened(data, model, inputs, num_samples, preprocess, seed)
    if inputs is None and isinstance(model, torch.nn.Module):
        inputs = shapes_of(model, batches.first())
    network = Network.of(source_of(model, inputs), batches, backend)
    keep = network.matching(ignored)
    with progress_bar("calibrating") as moved:
        table = collect(
            network.graph,
            network.source.inputs,
            network.batches,
            DEFAULT if algorithm == "auto" else algorithm,
            moved=lambda done: moved(done, num_samples),
            called=batches.called,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    table = msgspec.structs.replace(table, keep=keep)
    search = Search(network, validate, table)
    if algorithm == "auto":
        search.choose_algorithm()
    elif validate is not None:
        search.measure(table)
    if max_drop is not None:
        search.keep_layers(max_drop)
    return search.table


def settled_precision(precision: Precision | None, calibration: object) -> Precision | None:
    """The precision meant, where a calibration means int8.

    Raises:
        InputError: there is an 8-bit precision without calibration, or the other way round.
    """
    if calibration is None and precision in EIGHT_BITS:
        raise InputError(
            f"precision={precision!r} needs calibration=: a table from fastres.quantize, the path "
            "of one, or batches of inputs"
        )
    if calibration is not None and precision not in (None, *EIGHT_BITS):
        raise InputError(
            f"calibration= is for precision='int8' and 'fp8', not {precision!r}: leave one out"
        )
    return precision if calibration is None else precision or "int8"


def opened(
    calibration: Calibration | None, model: Model, inputs: Inputs | None
) -> CalibrationTable | Batches | None:
    """The table that `fastres.compile` was given, or the path of; or the data for one.

    Args:
        model, inputs: as `fastres.compile` has them. Data that the model cannot take are refused
            here, before it is exported.

    Raises:
        InputError: it is none of these, cannot be read, or is of the wrong kind.
    """
    if calibration is None or isinstance(calibration, CalibrationTable):
        return calibration
    if isinstance(calibration, str | os.PathLike):
        try:
            return CalibrationTable.load(calibration)
        except ValueError as error:
            raise InputError(str(error)) from error
    usual = inputs
    if inputs is None and isinstance(model, torch.nn.Module):
        usual = given_inputs(None, model)
    return _opened(calibration, model, usual, SAMPLES, None, 0)


def table_of(
    calibration: CalibrationTable | Batches | None, source: Source
) -> tuple[CalibrationTable | None, Sequence[Batch]]:
    """The table, made of the data where there is none yet.

    Args:
        calibration: as `opened` gave it.
        source: as the model is fed, whatever its engine will be.

    Returns:
        It, and the first of the data, where it was made of some.
    """
    if not isinstance(calibration, Batches):
        return calibration, ()
    graph = optimised(source.graph, CaptureError)
    shown: list[Batch] = []
    with progress_bar("calibrating") as moved:
        table = collect(
            graph,
            source.inputs,
            remembering(calibration, shown),
            DEFAULT,
            moved=lambda done: moved(done, calibration.samples),
            called=calibration.called,
        )
    return table, shown


def _opened(
    data: Data,
    model: Model,
    inputs: Inputs | None,
    samples: int,
    preprocess: Preprocess | None,
    seed: int,
) -> Batches:
    """Data as batches that the model takes, as far as that can be told before it is exported.

    Args:
        inputs: None for a module leaves sizes to the data.
    """
    entries, names = _inputs_of(model, inputs)
    batches = Batches(
        data,
        samples,
        inputs=max(1, len(entries)),
        preprocess=preprocess,
        seed=seed,
        names=names,
    )
    first = batches.first()
    if entries:
        check_batch(first, entries, 0)
    elif isinstance(model, torch.nn.Module) and (why := wrong_kind(first[0], runs_in(model))):
        raise InputError(f"the calibration data has {listed(first)}: {why}")
    return batches


def _inputs_of(model: Model, inputs: Inputs | None) -> tuple[tuple[Input, ...], list[str]]:
    """What a model is fed, as far as it is known, and the names of that."""
    if isinstance(model, torch.nn.Module):
        names = list(inspect.signature(model.forward).parameters)
        return () if inputs is None else given_inputs(inputs, model), names
    entries = inputs_of(model) if isinstance(model, Graph | ExportedProgram) else ()
    return entries, [entry.name or "" for entry in entries]
