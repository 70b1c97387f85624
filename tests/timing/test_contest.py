"""Contests between processes: order, checks, those who fail, and interrupts."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastres.errors import InputError, ParityError, UnsupportedError
from fastres.timing.checks import Reference
from fastres.timing.contest import Contest, Entrant
from fastres.timing.turns import MIN_ROUNDS
from fastres.tolerances import Errors

X = torch.ones(2, 3)
Make = Callable[..., Contest]


def entrant(name: str, maker: str, ours: bool = False, **arguments: Any) -> Entrant:
    return Entrant(name, "a net", "fp32", f"makers:{maker}", arguments, ours)


def twice(_: Entrant, batch: Tensor, rows: Sequence[int]) -> Reference:
    return Reference(2 * batch[list(rows)].double(), Errors(0.0, 0.0))


def at_ease(done: float) -> None:
    pass


@pytest.fixture
def contest(tmp_path: Path) -> Make:
    cores = sorted(os.sched_getaffinity(0))

    def make(*entrants: Entrant, batch_sizes: Sequence[int] = (2,), **more: Any) -> Contest:
        return Contest(entrants, batch_sizes=batch_sizes, cores=cores, folder=tmp_path, **more)

    return make


def test_the_right_are_timed_and_the_others_named(contest: Make) -> None:
    entrants = (
        entrant("ours", "sleeper", ours=True, seconds=0.002),
        entrant("slow", "sleeper", seconds=0.01),
        entrant("refused", "refused"),
        entrant("wrong", "wrong"),
        entrant("mortal", "mortal", calls=12),
    )
    done: list[float] = []
    with contest(*entrants) as running:
        running.prepare(done.append)
        running.check(X, twice)
        forecast = running.forecast(0.2, 2)
        running.time(2, 0.2, random.Random(0), at_ease)
    assert done == sorted(done) and done[-1] == 1 and len(done) == 5
    assert running.left_out.keys() == {"refused", "wrong at batch 2", "mortal at batch 2"}
    assert "not on a Monday" in running.left_out["refused"]
    assert "largest error" in running.left_out["wrong at batch 2"]
    assert "its process died, exit status 7" in running.left_out["mortal at batch 2"]
    ours, slow = running.measurements((50,))
    assert (ours.target, ours.model, ours.batch_size) == ("ours", "a net", 2)
    assert len(ours.round_ms) == len(slow.round_ms) >= MIN_ROUNDS
    assert ours.min_ms >= 2 and slow.min_ms >= 10
    assert ours.quantiles_ms[0] == pytest.approx(ours.min_ms) and len(ours.quantiles_ms) == 101
    assert [v.target for v in running.verdicts if not v.wrong] == ["ours", "slow", "mortal"]
    assert 0.4 < forecast < 5  # two of 0.2 s, warm-up, untimed calls


def test_nothing_is_timed_if_ours_is_wrong(contest: Make) -> None:
    with contest(entrant("ours", "wrong", ours=True)) as running:
        running.prepare(at_ease)
        with pytest.raises(ParityError, match="ours in fp32 at batch size 2"):
            running.check(X, twice)


def test_ours_must_be_made(contest: Make) -> None:
    with contest(entrant("ours", "refused", ours=True)) as running:
        with pytest.raises(UnsupportedError, match="not on a Monday"):
            running.prepare(at_ease)


def test_every_launch_is_a_new_process(contest: Make) -> None:
    entrants = [entrant(name, "sleeper", ours=True, seconds=0.001) for name in ("a", "b")]
    pids = set()
    with contest(*entrants, launches=3) as running:
        for _ in range(3):
            running.prepare(at_ease)
            running.check(X, twice)
            running.time(2, 0.1, random.Random(0), at_ease)
            pids |= {process.facts["pid"] for process in running.processes.values()}
    assert len(pids) == 6 and len(running.verdicts) == 2
    first, second = running.measurements((50,))
    assert len(first.launches) == 3 and min(first.launches) >= 3
    assert sum(first.launches) == len(first.round_ms) and first.launches == second.launches


def test_a_peer_that_fails_at_one_batch_size_is_timed_at_the_others(contest: Make) -> None:
    entrants = [
        entrant("ours", "sleeper", ours=True, seconds=0.001),
        entrant("small", "up_to", images=2),
    ]
    with contest(*entrants, batch_sizes=(1, 4, 2), launches=2) as running:
        for _ in range(2):
            running.prepare(at_ease)
            for size in (1, 4, 2):
                running.check(torch.ones(size, 3), twice)
                running.time(size, 0.05, random.Random(0), at_ease)
    assert running.left_out.keys() == {"small at batch 4"}
    assert "out of memory" in running.left_out["small at batch 4"]
    found = {(m.target, m.batch_size): len(m.launches) for m in running.measurements((50,))}
    assert found == {(name, size): 2 for name in ("ours", "small") for size in (1, 2)} | {
        ("ours", 4): 2
    }


def test_who_times_kernels_is_made_while_nothing_else_is(contest: Make) -> None:
    spans = []
    everybody = [entrant(name, "slowly_made", ours=True, seconds=0.3) for name in "ab"]
    everybody.insert(1, replace(entrant("tuner", "slowly_made", seconds=0.3), alone=True))
    with contest(*everybody) as running:
        running.prepare(at_ease)
        spans = [running.processes[name].facts["span"] for name in ("a", "b", "tuner")]
    (_, a), (_, b), (tuning, _) = spans
    assert tuning >= max(a, b)


def test_an_interrupt_keeps_whole_rounds(contest: Make) -> None:
    rounds: list[float] = []

    def interrupting(done: float) -> None:
        rounds.append(done)
        if len(rounds) == 3:
            raise KeyboardInterrupt

    entrants = [entrant(name, "sleeper", ours=True, seconds=0.001) for name in ("a", "b")]
    with contest(*entrants) as running:
        running.prepare(at_ease)
        running.check(X, twice)
        with pytest.raises(KeyboardInterrupt):
            running.time(2, 0.5, random.Random(0), interrupting)
    assert [len(m.round_ms) for m in running.measurements((50,))] == [3, 3]


def test_an_interrupt_while_some_are_made_anew_keeps_what_was_timed(
    contest: Make, tmp_path: Path
) -> None:
    def interrupting(done: float) -> None:
        raise KeyboardInterrupt

    entrants = (
        entrant("ours", "sleeper", ours=True, seconds=0.001),
        entrant("peer", "hung_later", path=tmp_path / "made"),
    )
    with contest(*entrants, launches=2) as running:
        running.prepare(at_ease)
        running.check(X, twice)
        running.time(2, 0.1, random.Random(0), at_ease)
        with pytest.raises(KeyboardInterrupt):
            running.prepare(interrupting)
    assert [m.target for m in running.measurements((50,))] == ["ours", "peer"]
    assert running.left_out == {}


def test_two_of_one_name(contest: Make) -> None:
    with pytest.raises(InputError, match="two targets have one name: a, a"):
        contest(entrant("a", "wrong"), entrant("a", "wrong"))
