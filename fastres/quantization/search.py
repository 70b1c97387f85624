"""Which table of the same data is the best: by algorithms, and by layers that stay out of int8."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import msgspec
import torch

from fastres.assembly.assemble import assemble, optimised
from fastres.assembly.parts import Origin
from fastres.backends.reference import ReferenceExecutable
from fastres.calib.table import AccuracyPoint, CalibrationTable
from fastres.calib.thresholds import ALGORITHMS
from fastres.engine.engine import Engine
from fastres.errors import CaptureError, InputError
from fastres.graph.ir import Graph
from fastres.graph.passes.quantise import quantise
from fastres.graph.quantisable import quantisable
from fastres.options import Options, is_number
from fastres.quantization.data import Batch
from fastres.quantization.image_noise import Exact
from fastres.source import Source
from fastres.text import progress_bar

Validate = Callable[[Engine], float]
PROBES = 32  # images by which algorithms and layers are compared without a validation


def remembering(batches: Iterable[Batch], shown: list[Batch]) -> Iterable[Batch]:
    """The same, while copies of the first images go into `shown`."""
    left = PROBES
    for batch in batches:
        if left > 0:
            shown.append(tuple(x[:left].clone() for x in batch))
            left -= len(batch[0])
        yield batch


@dataclass
class Network:
    """What is calibrated, and the first images that it was shown."""

    source: Source
    graph: Graph
    batches: Iterable[Batch]
    probes: list[Batch]
    backend: str | Sequence[str]

    @classmethod
    def of(cls, source: Source, batches: Iterable[Batch], backend: str | Sequence[str]) -> Network:
        network = cls(source, optimised(source.graph, CaptureError), (), [], backend)
        network.batches = remembering(batches, network.probes)
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
        options = Options(
            backend=(self.backend,) if isinstance(self.backend, str) else self.backend,
            precision=None if table is None else "int8",
        )
        origin = Origin(self.graph)
        return Engine(assemble(self.graph, origin, options, self.source.inputs, table=table))

    def outputs(self, table: CalibrationTable | None) -> Iterator[list[torch.Tensor]]:
        """Of each batch of probes, by the graph's meaning in PyTorch."""
        graph = self.graph if table is None else quantise(self.graph, table, "skip")
        executable = ReferenceExecutable(graph, torch.float32)
        return (executable.run(batch) for batch in self.probes)


class Search:
    """Compares tables of the same data."""

    def __init__(
        self, network: Network, validate: Validate | None, table: CalibrationTable
    ) -> None:
        self.table = table
        self._network = network
        self._validate = validate
        self._exact: Exact | None = None
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
        """In dB, of the outputs for a probe: the median of all probes."""
        if self._exact is None:
            counts = [len(batch[0]) for batch in self._network.probes]
            self._exact = Exact(list(self._network.outputs(None)), counts)
        return self._exact.median_sqnr(self._network.outputs(table))

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
