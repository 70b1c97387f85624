"""Contestants that take turns: rounds in an order drawn anew, calls timed within turns."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

TURNS = 20  # into which the time of one contestant is cut
MIN_ROUNDS = 8  # however slow the contestants are: fewer pairs say nothing
LONG = 1.0  # seconds of a call, beside which what the turn before left behind is nothing

Call = Callable[[Tensor], Any]
Progress = Callable[[float], None]
Rounds = list[list[float]]  # seconds of each call, by round


class Contestant(Protocol):
    """Something that is timed: a callable of this process, or a process of its own."""

    @property
    def name(self) -> str: ...

    def warm_up(self, seconds: float) -> float:
        """Runs for so long, untimed, and returns the seconds of the fastest call."""
        ...

    def turn(self, calls: int) -> list[float]:
        """The seconds of each of so many calls, after an untimed one; see `turn`."""
        ...


def interleave(
    contestants: Sequence[Contestant],
    duration_s: float,
    shuffler: random.Random,
    progress: Progress,
    timed: dict[str, Rounds],
    *,
    pause_s: float = 0.0,
    launches: int = 1,
) -> None:
    """Fills `timed` with the seconds of every timed call, by name and round.

    What is there when a turn is interrupted stays; the round that it broke off is taken back, so
    that all have the same rounds.

    Args:
        pause_s: before each turn, in which the threads of the one before come to rest.
        launches: this is one of so many, among which time and rounds are shared.
    """
    fastest = {c.name: c.warm_up(duration_s / 6) for c in contestants}
    timed.update({c.name: [] for c in contestants})
    spent, budget, rounds = 0.0, duration_s * len(contestants) / launches, 0
    least = rounds_at_least(launches)
    try:
        while rounds < least or spent < budget:
            for contestant in shuffler.sample(contestants, len(contestants)):
                calls = max(1, round(duration_s / TURNS / fastest[contestant.name]))
                if pause_s:
                    time.sleep(pause_s)
                seconds = contestant.turn(calls)
                timed[contestant.name].append(seconds)
                fastest[contestant.name] = min(fastest[contestant.name], *seconds)
                spent += sum(seconds)
            rounds += 1
            progress(min(1.0, spent / budget, rounds / least))
    finally:
        for turns in timed.values():
            del turns[rounds:]


def rounds_at_least(launches: int) -> int:
    """Of each of so many launches."""
    return max(3, math.ceil(MIN_ROUNDS / launches))


class Here:
    """A contestant of this process: a callable and the batch it is called with."""

    def __init__(self, name: str, call: Call, batch: Tensor) -> None:
        self.name, self._call, self._batch = name, call, batch

    def warm_up(self, seconds: float) -> float:
        return warm_up(self._call, self._batch, seconds)

    def turn(self, calls: int) -> list[float]:
        return turn(self._call, self._batch, calls)


def warm_up(call: Call, batch: Tensor, seconds: float) -> float:
    """Calls until the time is over, at least twice, and returns the fastest call's time."""
    call(batch)  # may compile for this shape: not part of the time
    end, fastest = time.perf_counter() + seconds, float("inf")
    while fastest == float("inf") or time.perf_counter() < end:
        fastest = min(fastest, _timed(call, batch))
    return fastest


def turn(call: Call, batch: Tensor, calls: int) -> list[float]:
    """The seconds of each of so many calls; a CUDA device is waited for.

    They come after an untimed call, in which threads and caches of the turn before are left behind.
    A long one is the first that counts.
    """
    first = _timed(call, batch)
    counts = [first] if first >= LONG else []
    return counts + [_timed(call, batch) for _ in range(calls - len(counts))]


def _timed(call: Call, batch: Tensor) -> float:
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    start = time.perf_counter()
    call(batch)
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    return time.perf_counter() - start
