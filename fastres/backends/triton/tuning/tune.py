"""Measuring the tiles of problems on the GPU that is here; what was wrong is never fast.

Each problem runs on random data over poisoned outputs: a tile whose result differs from PyTorch's
is left out, whatever its time. Results are kept after every problem, so that a run can be broken
off and taken up again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fastres.backends.triton.planning.problems import AnyTile, Problem
from fastres.backends.triton.planning.table import Entry, Table
from fastres.backends.triton.running.answering import answering
from fastres.backends.triton.running.timing import milliseconds
from fastres.backends.triton.tuning.trial import Trial
from fastres.backends.triton.tuning.trial_eight_bits import make_trial
from fastres.errors import DeviceLost
from fastres.kernels.cost import Target, target_of
from fastres.kernels.tiles import BoxTile

_TRIED = 16  # tiles a problem: the best by estimate


@dataclass(frozen=True)
class Attempt:
    """One tile of one problem: its time, or why it has none."""

    tile: AnyTile
    milliseconds: float | None
    reason: str = ""
    wrong: bool = False  # it ran, and the result is not the oracle's


def tune(
    problems: Iterable[Problem],
    table: Table,
    device: torch.device,
    *,
    keep: Callable[[Table], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
    tried: int = _TRIED,
) -> dict[Problem, list[Attempt]]:
    """Measures every problem that the table does not hold, and enters the fastest right tile.

    Args:
        table: is added to.
        keep: called with the table after each problem.
        progress: called before each problem with how many of how many are done.
        tried: tiles a problem.

    Returns:
        Every attempt, by problem.

    Raises:
        DeviceLost: the GPU answers no more; says with which tile of which problem that was.
    """
    target = target_of(device) if device.type == "cuda" else Target(90, 1)
    missing = [problem for problem in problems if problem.key not in table.entries]
    attempts = {}
    for done, problem in enumerate(missing):
        progress(done, len(missing))
        attempts[problem] = measure(problem, device, target, tried)
        timed = {a.tile: a.milliseconds for a in attempts[problem] if a.milliseconds is not None}
        if timed:
            best = min(timed, key=timed.__getitem__)
            table.entries[problem.key] = Entry(_fields(best), 1e3 * timed[best])
            keep(table)
    progress(len(missing), len(missing))
    return attempts


def tiles_to_try(problem: Problem, target: Target) -> list[AnyTile]:
    """A problem's tiles in the order in which they are tried, the best by estimate first.

    Where that splits the depth, the best that has the parts added by somebody else comes second:
    who is quicker, a second kernel or the last part's program, is what estimates know least.
    """
    tiles = problem.candidates(target)
    splits = [tile for tile in tiles if isinstance(tile, BoxTile) and tile.split_k > 1]
    if not splits or splits[0] is not tiles[0]:
        return tiles
    other = next((tile for tile in splits if tile.last_adds != splits[0].last_adds), None)
    ahead = tiles[:1] if other is None else [tiles[0], other]
    return [*ahead, *(tile for tile in tiles if tile not in ahead)]


def precompile(problem: Problem, target: Target, tried: int = _TRIED) -> int:
    """Compiles what `measure` will run, into Triton's cache; needs no GPU, so many can at a time.

    Returns:
        How many kernels compiled; those that do not are left for `measure` to name.
    """
    from fastres.kernels.aot import compile_kernel

    trial, compiled = make_trial(problem, torch.device("meta")), 0
    for tile in tiles_to_try(problem, target)[:tried]:
        try:
            for launch in trial.launches(tile, target):
                compile_kernel(launch, target.sm)
                compiled += 1
        except Exception:  # of Triton or its compiler: they raise many kinds
            continue
    return compiled


def measure(
    problem: Problem, device: torch.device, target: Target, tried: int = _TRIED
) -> list[Attempt]:
    """Tries tiles, the best by estimate first, one after the other.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    trial = make_trial(problem, device)
    attempts = []
    for tile in tiles_to_try(problem, target)[:tried]:
        try:
            with answering(device, f"{problem.key} with {tile}"):
                attempts.append(_attempt(trial, tile, target))
        except DeviceLost:
            raise
        except Exception as error:  # of Triton, its compiler or the driver: they raise many kinds
            reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
            attempts.append(Attempt(tile, None, reason))
    return attempts


def _attempt(trial: Trial, tile: AnyTile, target: Target) -> Attempt:
    trial.poison()
    calls = trial.calls(tile, target)

    def work() -> None:
        for call in calls:
            call()

    work()
    wrong = trial.difference()
    if wrong is not None:
        return Attempt(tile, None, wrong, wrong=True)
    return Attempt(tile, milliseconds(work, trial.device))


def _fields(tile: AnyTile) -> dict[str, object]:
    return dict(vars(tile))
