"""Has ours become slower? Two runs, compared through the peers that both of them timed.

A machine's speed changes from day to day, so times of different runs say little about a change of
ours. Each run has peers, which have not changed. The steadiest of them, whose ratio to ours varies
least between the launches of both runs, is the yardstick:

    relative = yardstick_ms / ours_ms        per round of one run
    change = relative now / relative then

with a 95 % interval (`fastres.timing.statistics`). Ours is called slower when the whole interval
lies below 1 - limit: where it does not, noise could explain what is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from fastres.errors import InputError
from fastres.text import render
from fastres.timing.report import Measurement, by_launch
from fastres.timing.statistics import Launches, Ratio, change, spread

Verdict = Literal["slower", "faster", "same", "unclear"]
Key = tuple[str, str, int]  # target, model, batch size
Run = Mapping[Key, "Timed | Measurement"]
SCHEMA = 1  # of what `fastres bench -o` writes


class Timed(msgspec.Struct, frozen=True):
    """What a comparison needs of a measurement."""

    target: str
    precision: str
    batch_size: int
    round_ms: tuple[float, ...]
    model: str = ""
    launches: tuple[int, ...] = ()

    @property
    def key(self) -> Key:
        return self.target, self.model, self.batch_size


class Base(msgspec.Struct, frozen=True):
    """An earlier run, as far as a comparison needs it."""

    command: str
    schema: int
    measurements: tuple[Timed, ...]
    lanes: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Row:
    """One of ours at one batch size. `change` is speed now over speed then."""

    target: str
    model: str
    precision: str
    batch_size: int
    yardstick: str
    change: Ratio
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """Ours now and then; `str()` is a table.

    Args:
        base: the file of the earlier run.
        limit: as a fraction: 0.05.
    """

    base: str
    limit: float
    rows: tuple[Row, ...]

    @property
    def slower(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.verdict == "slower")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        from rich.table import Table

        table = Table(title=f"speed now over speed in {self.base}, by a peer of both runs")
        columns = ("batch", "target", "precision", "measured by", "change")
        for column in (*columns, f"more than {self.limit:.0%}?"):
            table.add_column(column, no_wrap=True)
        for row in self.rows:
            words = (row.target, row.precision, row.yardstick, str(row.change), row.verdict)
            table.add_row(str(row.batch_size), *words)
        return render(table, width=160)


def read_base(path: Path) -> Base:
    """An earlier run's results.

    Raises:
        InputError: the file is missing, or is not what `fastres bench -o` writes.
    """
    try:
        base = msgspec.json.decode(path.read_bytes(), type=Base)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise InputError(
            f"{path} holds no results of fastres bench: {error}; make one with fastres bench ... "
            "-o FILE"
        ) from error
    if base.command != "bench" or base.schema != SCHEMA:
        raise InputError(
            f"{path} holds {base.command!r} of schema {base.schema}; --compare takes what fastres "
            f"bench -o writes, schema {SCHEMA}"
        )
    return base


def compare(
    measured: Sequence[Measurement],
    lanes: dict[str, tuple[str, ...]],
    base: Base,
    name: str,
    limit: float,
    seed: int = 0,
) -> Comparison:
    """Judges each of ours that both runs timed.

    Args:
        lanes: by the name of one of ours, the peers that ran the same model in that precision.
        name: of the earlier run, for the table.
        limit: how much slower is too much, as a fraction.

    Raises:
        InputError: the runs share nothing of ours, or no peer to measure it by.
    """
    now: Run = {(m.target, m.model, m.batch_size): m for m in measured}
    then: Run = {m.key: m for m in base.measurements}
    rows = []
    for m in measured:
        key = (m.target, m.model, m.batch_size)
        if m.target not in lanes or key not in then:
            continue
        peers = [
            peer
            for peer in lanes[m.target]
            if all((peer, m.model, m.batch_size) in run for run in (now, then))
        ]
        if not peers:
            raise InputError(
                f"{m.target} at batch {m.batch_size}: this run and {name} share no peer to measure "
                "it by; time the same --peers in both"
            )
        options = {peer: [_relative(run, key, peer) for run in (now, then)] for peer in peers}
        yardstick = min(options, key=lambda peer: sum(map(spread, options[peer])))
        relative_now, relative_then = options[yardstick]
        found = change(relative_now, relative_then, seed)
        verdict = _verdict(found, limit)
        rows.append(Row(m.target, m.model, m.precision, m.batch_size, yardstick, found, verdict))
    if not rows:
        raise InputError(
            f"{name} timed {', '.join(base.lanes)}; none of that is in this run: time the same "
            "models, precisions and batch sizes"
        )
    return Comparison(name, limit, tuple(rows))


def _relative(run: Run, ours: Key, peer: str) -> Launches:
    """How many times as fast as the peer, by round and launch."""
    own, theirs = run[ours], run[peer, ours[1], ours[2]]
    pairs = zip(theirs.round_ms, own.round_ms, strict=True)
    return by_launch([a / b for a, b in pairs], own.launches)


def _verdict(found: Ratio, limit: float) -> Verdict:
    if found.high < 1 - limit:
        return "slower"
    if found.low > 1 + limit:
        return "faster"
    return "same" if found.low >= 1 - limit and found.high <= 1 + limit else "unclear"
