"""Targets in processes of their own: made, checked, then timed in turns.

What cannot be made is left out and named. At each batch size every result is held to the tolerance
policy first. Nothing is timed if one of ours is wrong; a peer that is wrong or fails is left out at
that batch size.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from fastres.errors import FastresError, InputError
from fastres.options import EIGHT_BITS, Precision
from fastres.timing.checks import OWN_SCALES, Reference, Verdict, judge, rows_to_judge
from fastres.timing.processes import Process
from fastres.timing.report import Measurement, measurement
from fastres.timing.turns import LONG, TURNS, Progress, Rounds, interleave, rounds_at_least

PAUSE = 0.005  # seconds before a turn: threads of the target before spin that long at most
AT_ONCE = 2  # processes that are made at a time
PROFILING, PROFILING_S = 6, 5.0  # calls that a profile takes, about, or seconds if they are long

# what a result at these rows of the batch is held against; None: nothing is known of this network
Expected = Callable[["Entrant", Tensor, Sequence[int]], Reference | None]


@dataclass(frozen=True)
class Entrant:
    """A target to be: what it runs, and who makes it.

    Args:
        maker: "package.module:function", see `Process`.
        ours: ours must be right for anything to be timed, and is made first.
        alone: it times its own kernels while it is made, so nothing else is made meanwhile.
    """

    name: str
    model: str
    precision: Precision
    maker: str
    arguments: Mapping[str, Any]
    ours: bool = False
    alone: bool = False


class Contest:
    """Entrants in processes of their own, which end with the `with` block.

    Args:
        entrants: all of different names.
        batch_sizes: that will be timed.
        cores: every process is pinned to these.
        folder: an existing one for what processes print and hand over.
        launches: how many times `prepare` will be called.

    Raises:
        InputError: two entrants of one name.
    """

    def __init__(
        self,
        entrants: Sequence[Entrant],
        *,
        batch_sizes: Sequence[int],
        cores: Sequence[int],
        folder: Path,
        launches: int = 1,
    ) -> None:
        names = [entrant.name for entrant in entrants]
        if len(set(names)) < len(names):
            raise InputError(f"two targets have one name: {', '.join(names)}; give each model once")
        self.processes: dict[str, Process] = {}
        self.left_out: dict[str, str] = {}  # why, by name, with the batch size unless it is all
        self._invited = list(entrants)
        self._sizes = {name: list(batch_sizes) for name in names}  # where each takes part
        self.verdicts: list[Verdict] = []  # of the first launch
        self._facts: dict[str, dict[str, Any]] = {}  # that the makers told, by name
        self._timed: dict[tuple[int, str], list[Rounds]] = {}  # launches, by batch size and name
        self._cores, self._folder = cores, folder
        self._launches, self._preparing_s = launches, 0.0
        self._killed = False  # then nobody has failed whose process has died
        self._feeding_s: dict[str, float] = {}  # the latest, by name: compiles for that shape
        self._expecting_s: dict[int, float] = {}  # to know what is right, by batch size

    @property
    def entrants(self) -> list[Entrant]:
        """Who still takes part, at some batch size."""
        return [entrant for entrant in self._invited if self._sizes[entrant.name]]

    def _at(self, size: int) -> list[Entrant]:
        return [entrant for entrant in self._invited if size in self._sizes[entrant.name]]

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:  # nobody waits for what they are still doing
            self.kill()
        self.close()

    def prepare(self, progress: Progress) -> None:
        """Makes everybody anew, ours first.

        Args:
            progress: called with the share of entrants that are made.

        Raises:
            FastresError: one of ours cannot be made.
        """
        started = time.perf_counter()
        self.close()
        everybody = sorted(self.entrants, key=lambda entrant: not entrant.ours)
        together = [entrant for entrant in everybody if not entrant.alone]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                made = chain(
                    pool.map(self._make, together),
                    map(self._make, (entrant for entrant in everybody if entrant.alone)),
                )
                for done, _ in enumerate(made, start=1):
                    progress(done / len(everybody))
            except BaseException:  # nobody waits for what is still being made
                pool.shutdown(wait=False, cancel_futures=True)
                self.kill()
                raise
        self._preparing_s = time.perf_counter() - started

    def kill(self) -> None:
        """Ends all processes at once, whatever they do; what was timed is kept."""
        self._killed = True
        for process in tuple(self.processes.values()):
            process.kill()

    def close(self) -> None:
        """Ends all processes, which they do side by side."""
        ending = tuple(self.processes.values())
        for process in ending:
            process.dismiss()
        for process in ending:
            process.close()
        self.processes.clear()

    def _make(self, entrant: Entrant) -> None:
        process = Process(
            entrant.name,
            entrant.maker,
            entrant.arguments,
            cores=self._cores,
            folder=self._folder,
        )
        self.processes[entrant.name] = process
        if self._killed:  # by another thread, meanwhile
            process.kill()
        with self._leaving_out(entrant):
            self._facts[entrant.name] = process.wait()

    @property
    def backends(self) -> dict[str, str]:
        """Where ours run."""
        return {name: facts["backend"] for name, facts in self._facts.items() if "backend" in facts}

    def check(self, batch: Tensor, expected: Expected) -> None:
        """Gives everybody the batch and judges what they make of it.

        Raises:
            ParityError: one of ours is wrong.
        """
        rows = rows_to_judge(len(batch))
        known = {(verdict.target, verdict.batch_size) for verdict in self.verdicts}
        size, expecting_s = len(batch), 0.0
        for entrant in self._at(size):
            if entrant.name not in self.processes:  # it failed at the batch size before
                self._make(entrant)
        for entrant in self._at(size):
            with self._leaving_out(entrant, size):
                started = time.perf_counter()
                result = self.processes[entrant.name].feed(batch, rows=rows)
                fed = time.perf_counter()
                want = expected(entrant, batch, rows)
                self._feeding_s[entrant.name] = fed - started
                expecting_s += time.perf_counter() - fed
                if want is not None:
                    own_scales = entrant.precision in EIGHT_BITS and not entrant.ours
                    verdict = judge(
                        result,
                        want,
                        entrant.name,
                        entrant.precision,
                        size,
                        OWN_SCALES if own_scales else 2.0,
                    )
                    if (entrant.name, size) not in known:
                        self.verdicts.append(replace(verdict, model=entrant.model))
                    verdict.raise_if_wrong()
        self._expecting_s.setdefault(size, expecting_s)

    def forecast(self, duration_s: float, fed: int, profiles: int = 0) -> float:
        """Seconds that all of it will take after the first check, which was of `fed` images.

        Args:
            profiles: how often each of ours will be profiled at each batch size.
        """
        seconds = self._preparing_s * (self._launches - 1)
        sizes = {size for entrant in self.entrants for size in self._sizes[entrant.name]} - {fed}
        rows = sum(len(rows_to_judge(size)) for size in sizes) / len(rows_to_judge(fed))
        seconds += rows * self._expecting_s[fed]  # once: later launches are held against the same
        for entrant in self._at(fed):
            with self._leaving_out(entrant, fed):
                (one,) = self.processes[entrant.name].turn(1)
                compiling = max(0.0, self._feeding_s[entrant.name] - one)
                for size in self._sizes[entrant.name]:
                    call = one * size / fed
                    calls = max(1, round(duration_s / TURNS / call))
                    share = duration_s / self._launches / (calls * call)
                    rounds = self._launches * max(rounds_at_least(self._launches), share)
                    warming = self._launches * (duration_s / 6 + call)
                    untimed = call if call < LONG else 0.0
                    seconds += warming + rounds * (calls * call + untimed + PAUSE)
                    seconds += self._launches * (compiling + call)  # before its check
                    profiling = call * max(2, min(PROFILING, round(PROFILING_S / call)))
                    seconds += entrant.ours * profiles * (compiling + profiling)
        return seconds

    def time(
        self, size: int, duration_s: float, shuffler: random.Random, progress: Progress
    ) -> None:
        """Times this launch with the batch that was fed; what an interrupt leaves is kept."""
        timed: dict[str, Rounds] = {}
        while taking_part := self._at(size):
            contestants = [self.processes[entrant.name] for entrant in taking_part]
            try:
                interleave(
                    contestants,
                    duration_s,
                    shuffler,
                    progress,
                    timed,
                    pause_s=PAUSE,
                    launches=self._launches,
                )
                break
            except FastresError:  # the others start again
                for entrant in taking_part:
                    with self._leaving_out(entrant, size):
                        self.processes[entrant.name].raise_failure()
            except KeyboardInterrupt:
                self._keep(size, timed)
                raise
        self._keep(size, timed)

    def _keep(self, size: int, timed: dict[str, Rounds]) -> None:
        for entrant in self._at(size):
            if timed.get(entrant.name):
                self._timed.setdefault((size, entrant.name), []).append(timed[entrant.name])

    def measurements(self, percentiles: Sequence[float]) -> tuple[Measurement, ...]:
        """What is known of all who took part at a batch size to the end, by batch size."""
        by_name = {entrant.name: entrant for entrant in self._invited}
        return tuple(
            measurement(
                name,
                by_name[name].precision,
                size,
                launches,
                percentiles,
                by_name[name].model,
                self._facts[name].get("precision", ""),
            )
            for (size, name), launches in self._timed.items()
            if size in self._sizes[name]
        )

    @contextmanager
    def _leaving_out(self, entrant: Entrant, size: int | None = None) -> Iterator[None]:
        """A peer that fails inside is out, there or everywhere; one of ours ends the contest."""
        try:
            yield
        except FastresError as error:
            if entrant.ours or self._killed:
                raise
            where = "" if size is None else f" at batch {size}"
            self.left_out[entrant.name + where] = str(error)
            left = self._sizes[entrant.name]
            self._sizes[entrant.name] = [n for n in left if n != size] if size is not None else []
            self.processes.pop(entrant.name).close()
