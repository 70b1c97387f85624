"""Targets in processes of their own: made, checked, then timed in turns.

What cannot be made is left out and named. At each batch size every result is held to the tolerance
policy first. Nothing is timed if one of ours is wrong; a peer that is wrong is left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastres.errors import FastresError, InputError
from fastres.options import EIGHT_BITS, Precision
from fastres.timing.checks import OWN_SCALES, Reference, Verdict, judge, rows_to_judge
from fastres.timing.processes import Process
from fastres.timing.report import Measurement, measurement
from fastres.timing.turns import MIN_ROUNDS, TURNS, Progress, Rounds, interleave

PAUSE = 0.005  # seconds before a turn: threads of the target before spin that long at most
AT_ONCE = 2  # processes that are made at a time

# what a result at these rows of the batch is held against; None: nothing is known of this network
Expected = Callable[["Entrant", Tensor, Sequence[int]], Reference | None]


@dataclass(frozen=True)
class Entrant:
    """A target to be: what it runs, and who makes it.

    Args:
        maker: "package.module:function", see `Process`.
        ours: ours must be right for anything to be timed, and is made first.
    """

    name: str
    model: str
    precision: Precision
    maker: str
    arguments: Mapping[str, Any]
    ours: bool = False


class Contest:
    """Entrants in processes of their own, which end with the `with` block.

    Args:
        entrants: all of different names.
        cores: every process is pinned to these.
        folder: an existing one for what processes print and hand over.

    Raises:
        InputError: two entrants of one name.
    """

    def __init__(self, entrants: Sequence[Entrant], *, cores: Sequence[int], folder: Path) -> None:
        names = [entrant.name for entrant in entrants]
        if len(set(names)) < len(names):
            raise InputError(f"two targets have one name: {', '.join(names)}")
        self.entrants = list(entrants)  # who still takes part
        self.processes: dict[str, Process] = {}
        self.left_out: dict[str, str] = {}  # why, by name
        self.verdicts: list[Verdict] = []
        self.measurements: list[Measurement] = []
        self._cores, self._folder = cores, folder

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.close()

    def prepare(self, progress: Progress) -> None:
        """Makes everybody, ours first.

        Args:
            progress: called with the share of entrants that are made.

        Raises:
            FastresError: one of ours cannot be made.
        """
        done, everybody = 0, tuple(self.entrants)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for ours in (True, False):
                group = [entrant for entrant in everybody if entrant.ours is ours]
                for _ in pool.map(self._make, group):
                    done += 1
                    progress(done / len(everybody))

    def _make(self, entrant: Entrant) -> None:
        process = Process(
            entrant.name,
            entrant.maker,
            entrant.arguments,
            cores=self._cores,
            folder=self._folder,
        )
        self.processes[entrant.name] = process
        with self._leaving_out(entrant):
            process.wait()

    @property
    def backends(self) -> dict[str, str]:
        """Where ours run."""
        return {
            name: process.facts["backend"]
            for name, process in self.processes.items()
            if "backend" in process.facts
        }

    def check(self, batch: Tensor, expected: Expected) -> None:
        """Gives everybody the batch and judges what they make of it.

        Raises:
            ParityError: one of ours is wrong.
        """
        rows = rows_to_judge(len(batch))
        for entrant in tuple(self.entrants):
            with self._leaving_out(entrant):
                result = self.processes[entrant.name].feed(batch, rows=rows)
                want = expected(entrant, batch, rows)
                if want is not None:
                    own_scales = entrant.precision in EIGHT_BITS and not entrant.ours
                    verdict = judge(
                        result,
                        want,
                        entrant.name,
                        entrant.precision,
                        len(batch),
                        OWN_SCALES if own_scales else 2.0,
                    )
                    self.verdicts.append(replace(verdict, model=entrant.model))
                    verdict.raise_if_wrong()

    def forecast(self, duration_s: float, batch_sizes: Sequence[int], fed: int) -> float:
        """Seconds that timing will take, by one call of each with the batch of `fed` images."""
        seconds = 0.0
        for entrant in tuple(self.entrants):
            with self._leaving_out(entrant):
                (one,) = self.processes[entrant.name].turn(1)
                for size in batch_sizes:
                    call = one * size / fed
                    calls = max(1, round(duration_s / TURNS / call))
                    rounds = max(MIN_ROUNDS, duration_s / (calls * call))
                    seconds += duration_s / 6 + rounds * ((calls + 1) * call + PAUSE)
        return seconds

    def time(
        self,
        size: int,
        duration_s: float,
        percentiles: Sequence[float],
        shuffler: random.Random,
        progress: Progress,
    ) -> None:
        """Times everybody with the batch they were given; what an interrupt leaves is kept."""
        timed: dict[str, Rounds] = {}
        while self.entrants:
            contestants = [self.processes[entrant.name] for entrant in self.entrants]
            try:
                interleave(contestants, duration_s, shuffler, progress, timed, pause_s=PAUSE)
                break
            except FastresError:  # the others start again
                for entrant in tuple(self.entrants):
                    with self._leaving_out(entrant):
                        self.processes[entrant.name].raise_failure()
            except KeyboardInterrupt:
                self._keep(size, timed, percentiles)
                raise
        self._keep(size, timed, percentiles)

    def _keep(self, size: int, timed: dict[str, Rounds], percentiles: Sequence[float]) -> None:
        for e in self.entrants:
            if timed.get(e.name):
                rounds = timed[e.name]
                ran = self.processes[e.name].facts.get("precision", "")
                self.measurements.append(
                    measurement(e.name, e.precision, size, rounds, percentiles, e.model, ran)
                )

    @contextmanager
    def _leaving_out(self, entrant: Entrant) -> Iterator[None]:
        """An entrant that fails inside takes no further part; one of ours ends the contest."""
        try:
            yield
        except FastresError as error:
            if entrant.ours:
                raise
            self.left_out[entrant.name] = str(error)
            self.entrants.remove(entrant)
            self.processes[entrant.name].close()
