"""Has ours become slower? Two runs, compared through the peers that both of them timed.

A machine's speed changes from day to day, so times of different runs say little about a change of
ours. Each run has peers, which have not changed, or it is said that they have. The steadiest of
them, whose ratio to ours varied least between the launches of the earlier run, is the yardstick:

    relative = yardstick_ms / ours_ms        per round of one run
    change = relative now / relative then

with a 95 % interval (`fastres.timing.statistics`). Ours is called slower when the whole interval
lies below 1 - limit: where it does not, noise could explain what is seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from fastres.calib.files import MOST_BYTES, read_regular
from fastres.errors import InputError
from fastres.text import render_whole
from fastres.timing.machine import Machine
from fastres.timing.report import Measurement, by_launch
from fastres.timing.statistics import Launches, Ratio, change, spread

Verdict = Literal["slower", "faster", "same", "unclear"]
Key = tuple[str, str, str, int]  # model, precision, name without what tells targets apart, batch
Run = Mapping[Key, "Timed | Measurement"]
SCHEMA = 1  # of what `fastres bench -o` writes
SHORTEST_MS, LONGEST_MS = 1e-6, 1e9  # what is no time of a round
LAUNCHES = 2  # of one run: fewer say nothing of what differs between launches


class Timed(msgspec.Struct, frozen=True):
    """What a comparison needs of a measurement."""

    target: str
    precision: str
    batch_size: int
    round_ms: tuple[float, ...]
    model: str = ""
    launches: tuple[int, ...] = ()


class Place(msgspec.Struct, frozen=True):
    """Where a run was made."""

    cpu: str
    gpu: str | None
    threads: int
    versions: dict[str, str]


class Conditions(msgspec.Struct, frozen=True):
    """How a run was made; `input` is the shape of one image."""

    finished: bool
    transfers: str
    input: tuple[int, ...] | None = None


class Head(msgspec.Struct, frozen=True):
    """What every document has."""

    command: str
    schema: int = 0


class Base(msgspec.Struct, frozen=True):
    """An earlier run, as far as a comparison needs it."""

    measurements: tuple[Timed, ...]
    lanes: dict[str, tuple[str, ...]]
    machine: Place
    run: Conditions
    backends: dict[str, str] = {}


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
        notes: what could not be judged, and what has changed besides.
    """

    base: str
    limit: float
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

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
        return "\n".join([render_whole(table), *self.notes])


def read_base(path: Path) -> Base:
    """An earlier run's results.

    Raises:
        InputError: the file is missing, or is not what `fastres bench -o` writes.
    """
    try:
        text = read_regular(path, MOST_BYTES)
        head = msgspec.json.decode(text, type=Head)
        if head.command != "bench" or head.schema != SCHEMA:
            raise InputError(
                f"{path} holds {head.command!r} of schema {head.schema}; --compare takes what "
                f"fastres bench -o writes, schema {SCHEMA}"
            )
        base = msgspec.json.decode(text, type=Base)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(
            f"{path} holds no results of fastres bench: {error}; make one with fastres bench ... "
            "-o FILE"
        ) from error
    if not base.run.finished:
        raise InputError(f"{path} was interrupted: make another one to compare with")
    rounds: dict[int, int] = {}  # by batch size: all that were timed together have as many
    launches: dict[int, tuple[int, ...]] = {}
    for timed in base.measurements:
        sound = all(SHORTEST_MS <= ms <= LONGEST_MS for ms in timed.round_ms)
        count = rounds.setdefault(timed.batch_size, len(timed.round_ms))
        counted = sum(timed.launches) if min(timed.launches, default=1) > 0 else -1
        alike = launches.setdefault(timed.batch_size, timed.launches) == timed.launches
        if not (sound and alike) or not 0 < len(timed.round_ms) == count == (counted or count):
            raise InputError(
                f"{path} is damaged: the rounds of {timed.target} at batch {timed.batch_size} are "
                "no times, or not as many as its launches and the others have"
            )
    twice = [key for key, n in Counter(map(key_of, base.measurements)).items() if n > 1]
    if twice:
        raise InputError(f"{path} is damaged: it has {', '.join(map(str, twice[0]))} twice")
    return base


def check_conditions(base: Base, name: str, machine: Machine, run: Conditions) -> None:
    """Refuses an earlier run that says nothing about this one, before anything is timed.

    Raises:
        InputError: naming what differs.
    """
    pairs = {
        "processor": (base.machine.cpu, machine.cpu),
        "GPU": (base.machine.gpu, machine.gpu),
        "number of threads": (base.machine.threads, machine.threads),
        "transfers": (base.run.transfers, run.transfers),
        "size of images": (base.run.input or run.input, run.input),
    }
    for what, (then, now) in pairs.items():
        if then != now:
            raise InputError(f"the {what} of {name} is {then}, here it is {now}: make a base here")


def key_of(measured: Timed | Measurement) -> Key:
    """By which runs know the same target: with other models beside it, it has a longer name."""
    bare = measured.target.rpartition(" ")[2]
    return measured.model, measured.precision, bare, measured.batch_size


def compare(
    measured: Sequence[Measurement],
    lanes: Mapping[str, tuple[str, ...]],
    base: Base,
    name: str,
    limit: float,
    seed: int = 0,
    backends: Mapping[str, str] = MappingProxyType({}),
    versions: Mapping[str, str] = MappingProxyType({}),
) -> Comparison:
    """Judges each of ours that both runs timed.

    Args:
        lanes: by the name of one of ours, the peers that ran the same model in that precision.
        name: of the earlier run, for the table.
        limit: how much slower is too much, as a fraction.
        backends: where ours ran, by name.
        versions: of packages here.

    Raises:
        InputError: nothing of ours can be judged; says why.
    """
    now: Run = {key_of(m): m for m in measured}
    then: Run = {key_of(m): m for m in base.measurements}
    ran = {key_of(m): base.backends.get(m.target) for m in base.measurements}
    rows, notes, judged = [], [], set()
    for m in measured:
        if m.target not in lanes:
            continue
        key = key_of(m)
        peers = _shared(m, lanes[m.target], now, then)
        what = f"{m.target} at batch {m.batch_size}"
        judged.add(key)
        if key not in then:
            notes.append(f"not judged: {what}: {name} has not timed it")
        elif not peers:
            notes.append(
                f"not judged: {what}: no peer that runs {m.precision} was timed beside it in both "
                "runs; time the same --peers, and among them one that does"
            )
        elif ran[key] is not None and ran[key] != backends.get(m.target, ran[key]):
            notes.append(f"not judged: {what}: it ran on {ran[key]} then")
        else:
            rows.append(_row(m, peers, now, then, limit, seed))
    missing = [m for m in base.measurements if m.target in base.lanes and key_of(m) not in judged]
    notes += [f"not timed now: {m.target} at batch {m.batch_size}" for m in missing]
    if not rows:
        raise InputError("\n".join([f"nothing of ours can be judged by {name}", *notes]))
    old = base.machine.versions
    notes += [
        f"since then: {package} {old[package]} is now {version}"
        for package, version in versions.items()
        if old.get(package, version) != version
    ]
    return Comparison(name, limit, tuple(rows), tuple(notes))


def _shared(m: Measurement, lane: Sequence[str], now: Run, then: Run) -> list[Key]:
    """The peers of one of ours that both runs timed."""
    bare = (peer.rpartition(" ")[2] for peer in lane)
    keys = [(m.model, m.precision, peer, m.batch_size) for peer in bare]
    return [key for key in keys if key in now and key in then]


def _row(m: Measurement, peers: Sequence[Key], now: Run, then: Run, limit: float, seed: int) -> Row:
    """Judged by the peer that varied least in the earlier run: this one has no say in it."""
    key = key_of(m)
    yardstick = min(peers, key=lambda peer: spread(_relative(then, key, peer)))
    relative_now, relative_then = (_relative(run, key, yardstick) for run in (now, then))
    found = change(relative_now, relative_then, seed)
    enough = min(len(relative_now), len(relative_then)) >= LAUNCHES
    verdict = _verdict(found, limit) if enough else "unclear"
    return Row(m.target, m.model, m.precision, m.batch_size, yardstick[2], found, verdict)


def _relative(run: Run, ours: Key, peer: Key) -> Launches:
    """How many times as fast as the peer, by round and launch."""
    own, theirs = run[ours], run[peer]
    pairs = zip(theirs.round_ms, own.round_ms, strict=True)
    return by_launch([a / b for a, b in pairs], own.launches)


def _verdict(found: Ratio, limit: float) -> Verdict:
    if found.high < 1 - limit:
        return "slower"
    if found.low > 1 + limit:
        return "faster"
    return "same" if found.low >= 1 - limit and found.high <= 1 + limit else "unclear"
