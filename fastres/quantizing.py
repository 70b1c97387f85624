"""fastres.quantize: a calibration table, its algorithm, and the layers that stay out of int8."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import msgspec
import torch

from fastres.backends.reference import ReferenceExecutable
from fastres.calib.images import Preprocess
from fastres.calib.table import AccuracyPoint, CalibrationTable
from fastres.calib.thresholds import ALGORITHMS, Algorithm
from fastres.calibrating import Batch, Batches, Data, collect, first_of, shapes_of
from fastres.engine import Engine
from fastres.errors import CaptureError, InputError
from fastres.graph.ir import Graph
from fastres.graph.passes.quantise import quantise
from fastres.graph.quantisable import quantisable
from fastres.options import EIGHT_BITS, PathLike, Precision, integer, is_number
from fastres.source import Inputs, Model, Source, source_of
from fastres.text import progress_bar
from fastres.tolerances import Distance

Calibration = CalibrationTable | PathLike | Iterable[Any]
Validate = Callable[[Engine], float]
DEFAULT: Algorithm = "mse"
PROBES = 32  # images by which algorithms and layers are compared without a validation


def quantize(
    model: Model,
    data: Data,
    *,
    algorithm: Algorithm | Literal["auto"] = "auto",
    num_samples: int = 512,
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
            `preprocess`), or an iterable of batches, such as a DataLoader.
        algorithm: "minmax", "percentile" (99.99), "percentile-99.9", "entropy" or "mse". "auto"
            takes the one with which `validate` gives most; without that, the one whose outputs have
            the highest SQNR on the first 32 images.
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
        in floating point, `table.curve` the accuracies. The same data and seed give the same bytes
        on the same machine and versions.

    Raises:
        InputError: an argument is out of range; the data is empty, does not fit the model, or makes
            a tensor hold NaN or infinities (named).
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
    network = _Network.read(model, data, inputs, num_samples, preprocess, seed, backend)
    keep = network.matching(ignored)
    with progress_bar("calibrating") as moved:
        table = collect(
            network.graph,
            network.source.inputs,
            network.batches,
            DEFAULT if algorithm == "auto" else algorithm,
            moved=lambda done: moved(done, num_samples),
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    table = msgspec.structs.replace(table, keep=keep)
    search = _Search(network, validate, table)
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


def table_of(calibration: Calibration, source: Source) -> tuple[CalibrationTable, Sequence[Batch]]:
    """The table that `fastres.compile` was given, the path of, or the data for.

    Args:
        source: as the model is fed, whatever its engine will be.

    Returns:
        It, and the first of the data, where it was made of some.

    Raises:
        InputError: it is none of these, or cannot be read.
    """
    if isinstance(calibration, CalibrationTable):
        return calibration, ()
    if isinstance(calibration, str | os.PathLike):
        try:
            return CalibrationTable.load(calibration), ()
        except ValueError as error:
            raise InputError(str(error)) from error
    from fastres.compiler import optimised

    batches = Batches(calibration, 512, inputs=len(source.inputs), preprocess=None, seed=0)
    graph = optimised(source.graph, CaptureError)
    shown: list[Batch] = []
    with progress_bar("calibrating") as moved:
        table = collect(
            graph,
            source.inputs,
            remembering(batches, shown),
            DEFAULT,
            moved=lambda done: moved(done, batches.samples),
        )
    return table, shown


def remembering(batches: Iterable[Batch], shown: list[Batch]) -> Iterable[Batch]:
    """The same, while copies of the first images go into `shown`."""
    left = PROBES
    for batch in batches:
        if left > 0:
            shown.append(tuple(x[:left].clone() for x in batch))
            left -= len(batch[0])
        yield batch


@dataclass
class _Network:
    """What is calibrated, and the first images that it was shown."""

    source: Source
    graph: Graph
    batches: Iterable[Batch]
    probes: list[Batch]
    backend: str | Sequence[str]

    @classmethod
    def read(
        cls,
        model: Model,
        data: Data,
        inputs: Inputs | None,
        samples: int,
        preprocess: Preprocess | None,
        seed: int,
        backend: str | Sequence[str],
    ) -> _Network:
        from fastres.compiler import optimised

        takes = len(inputs) if isinstance(inputs, tuple | list) else 1
        batches = Batches(data, samples, inputs=takes, preprocess=preprocess, seed=seed)
        first, every = first_of(batches)
        free = inputs is None and isinstance(model, torch.nn.Module)
        source = source_of(model, shapes_of(first) if free else inputs)
        network = cls(source, optimised(source.graph, CaptureError), (), [], backend)
        network.batches = remembering(every, network.probes)
        return network

    @property
    def layers(self) -> list[str]:
        return [node.name for node in self.graph.nodes if quantisable(node)]

    def matching(self, patterns: Collection[str]) -> tuple[str, ...]:
        """The layers that some pattern fits, in order.

        Raises:
            InputError: a pattern fits none.
        """
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        if not isinstance(patterns, Collection) or not all(isinstance(p, str) for p in patterns):
            raise InputError(f"ignored is {patterns!r}; give names or patterns of layers")
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in self.layers):
                raise InputError(
                    f"ignored has {pattern!r}, which fits no layer; there are "
                    f"{', '.join(self.layers[:6])} ..."
                )
        return tuple(n for n in self.layers if any(fnmatchcase(n, p) for p in patterns))

    def engine(self, table: CalibrationTable | None) -> Engine:
        """Of the float network, or quantised."""
        from fastres.compiler import assemble
        from fastres.engine import Origin
        from fastres.options import Options

        options = Options(
            backend=(self.backend,) if isinstance(self.backend, str) else self.backend,
            precision=None if table is None else "int8",
        )
        return assemble(self.graph, Origin(self.graph), options, self.source.inputs, table=table)

    def outputs(self, table: CalibrationTable | None) -> list[torch.Tensor]:
        """Of the probes, by the graph's meaning in PyTorch."""
        graph = self.graph if table is None else quantise(self.graph, table, "skip")
        executable = ReferenceExecutable(graph, torch.float32)
        return [y for batch in self.probes for y in executable.run(batch)]


class _Search:
    """Compares tables of the same data."""

    def __init__(
        self, network: _Network, validate: Validate | None, table: CalibrationTable
    ) -> None:
        self.table = table
        self._network = network
        self._validate = validate
        self._exact: list[torch.Tensor] | None = None
        if validate is not None:
            base = self._accuracy(None)
            self._note(AccuracyPoint("", (), base))

    def choose_algorithm(self) -> None:
        """Takes the best of the algorithms, the earlier one of equals."""
        candidates = [self.table.using(name) for name in ALGORITHMS]
        if self._validate is None:
            self.table = max(candidates, key=self._sqnr)
            return
        measured = {table.algorithm: self.measure(table) for table in candidates}
        self.table = self.table.using(max(measured, key=lambda name: measured[name]))

    def measure(self, table: CalibrationTable) -> float:
        """Accuracy of a table, which is noted."""
        accuracy = self._accuracy(table)
        self._note(AccuracyPoint(table.algorithm, table.keep, accuracy))
        return accuracy

    def keep_layers(self, max_drop: float) -> None:
        """Leaves the most sensitive layers in floating point until the drop is small enough.

        The number of layers is doubled until it is, then halved into; with all of them the network
        is what it was.
        """
        wanted = self.table.curve[0].accuracy - max_drop
        latest = next(p for p in self.table.curve if p.algorithm == self.table.algorithm)
        if latest.accuracy >= wanted:
            return
        order = self._most_sensitive_first()
        ignored = self.table.keep
        position = {name: i for i, name in enumerate(self._network.layers)}
        tried: dict[int, tuple[CalibrationTable, float]] = {}

        def reaches(count: int) -> bool:
            keep = tuple(sorted({*ignored, *order[:count]}, key=position.__getitem__))
            table = msgspec.structs.replace(self.table, keep=keep)
            tried[count] = table, self.measure(table)
            return tried[count][1] >= wanted

        failing, count = 0, 1
        while count < len(order) and not reaches(count):
            failing, count = count, 2 * count
        good = min(count, len(order))
        if good not in tried:
            reaches(good)
        while good - failing > 1:
            middle = (good + failing) // 2
            failing, good = (failing, middle) if reaches(middle) else (middle, good)
        self.table = msgspec.structs.replace(self.table, keep=tried[good][0].keep)

    def _most_sensitive_first(self) -> list[str]:
        """Layers not yet kept, by the SQNR of the outputs with that layer alone in int8."""
        layers = self._network.layers
        candidates = [name for name in layers if name not in self.table.keep]
        found: dict[str, float] = {}
        with progress_bar("sensitivity of layers") as moved:
            for i, name in enumerate(candidates):
                others = tuple(other for other in layers if other != name)
                alone = msgspec.structs.replace(self.table, keep=others)
                found[name] = round(min(self._sqnr(alone), 999.0), 2)
                moved(i + 1, len(candidates))
        self.table = msgspec.structs.replace(self.table, sensitivity=found)
        return sorted(candidates, key=lambda name: found[name])

    def _sqnr(self, table: CalibrationTable) -> float:
        """In dB, of the outputs for the probes; the worst of several."""
        if self._exact is None:
            self._exact = self._network.outputs(None)
        distances = []
        outputs = len(self._network.graph.outputs)
        found = self._network.outputs(table)
        for i in range(outputs):
            distance = Distance()
            for y, exact in zip(found[i::outputs], self._exact[i::outputs], strict=True):
                distance.add(y, exact.double())
            distances.append(distance.sqnr_db)
        return min(distances)

    def _accuracy(self, table: CalibrationTable | None) -> float:
        assert self._validate is not None
        with self._network.engine(table) as engine:
            accuracy = self._validate(engine)
            self._backend = engine.backend.name
        if not is_number(accuracy) or not math.isfinite(accuracy):
            raise InputError(
                f"validate returned {accuracy!r}; it must return a number, the accuracy"
            )
        return float(accuracy)

    def _note(self, point: AccuracyPoint) -> None:
        self.table = msgspec.structs.replace(
            self.table, curve=(*self.table.curve, point), backend=self._backend
        )
