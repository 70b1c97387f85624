"""How often the regression guard is right: equal runs, and runs with a planted slowdown.

python -m bench.cpu.guard_trials [--trials 20] [--limit 0.05] [-o FILE.json]

Each trial makes three runs as `fastres bench` does, every target in a process of its own: a base,
the same again, and one in which ours, and ours alone, runs a network of a tenth more layers under
the same name. Counted is how often the guard calls the second and the third slower, and how often
the intervals of all ratios of the first two overlap. The file is written after each trial; an
interrupt keeps the trials that are done, and the exit status is 130. `fastres report` shows it.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec
import torch

import fastres
from bench.documents import check_output, headed
from fastres import models
from fastres.cli.output import write_file
from fastres.errors import BackendUnavailable, FastresError, is_interrupt
from fastres.options import Options, Precision
from fastres.text import json_text
from fastres.timing.contest import Contest, Entrant
from fastres.timing.guard import SCHEMA, Base, Comparison, compare
from fastres.timing.machine import cores, machine
from fastres.timing.peers import PEERS, make_peer, refusal
from fastres.timing.peers_torch import torch_threads
from fastres.timing.processes import Made
from fastres.timing.report import BenchReport, Measurement
from fastres.timing.statistics import Ratio

OURS = "fastres"


@dataclass(frozen=True)
class Trial:
    """Changes as the guard sees them, its verdicts, and whether equal runs agree."""

    same: Ratio
    same_verdict: str
    slowed: Ratio
    slowed_verdict: str
    agree: bool
    seconds: float


def network(name: str, size: int) -> torch.nn.Module:
    """The same in every process."""
    model = untrained(name)
    picture = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    settled: torch.nn.Module = models.settle(model, picture)
    return settled


def untrained(name: str) -> torch.nn.Module:
    factory, _, depth = name.partition(":")
    arguments = (int(depth),) if depth else ()
    made: torch.nn.Module = getattr(models, factory)(*arguments, seed=0)
    return made


def ours(engine: Path) -> Made:
    return Made(fastres.load(engine))


def peer(peer: str, name: str, batch_size: int, size: int, precision: Any, threads: int) -> Made:
    with torch_threads(threads):
        x = torch.zeros(batch_size, 3, size, size)
        target = make_peer(peer, network(name, size), x, precision=precision, threads=threads)
    torch.set_num_threads(threads)
    return Made(target.call)


def keep_engine(given: argparse.Namespace, model: str, path: Path) -> None:
    """Saves what `ours` loads, so that a run need not compile it for every process."""
    x = torch.zeros(given.batch_size, 3, given.image_size, given.image_size)
    how = {"precision": given.precision, "threads": Options().num_threads}
    fastres.compile(network(model, given.image_size), x, backend="cpu", **how).save(path)


def run(given: argparse.Namespace, seed: int, engine: Path) -> BenchReport:
    """One run of ours, which is that engine, and the peers, which run the usual network.

    Raises:
        BackendUnavailable: a peer cannot run here; without it a run would not be what was asked.
        FastresError: ours cannot.
    """
    threads = Options().num_threads
    common = {
        "name": given.model,
        "batch_size": given.batch_size,
        "size": given.image_size,
        "precision": given.precision,
        "threads": threads,
    }
    made = {"engine": engine}
    entrants = [
        Entrant(OURS, given.model, given.precision, "bench.cpu.guard_trials:ours", made, ours=True)
    ]
    entrants += [
        Entrant(
            p, given.model, given.precision, "bench.cpu.guard_trials:peer", {"peer": p, **common}
        )
        for p in given.peers.split(",")
    ]
    batch = torch.randn(given.batch_size, 3, given.image_size, given.image_size)
    with tempfile.TemporaryDirectory() as folder:
        with Contest(
            entrants,
            batch_sizes=[len(batch)],
            cores=cores(threads),
            folder=Path(folder),
            launches=given.launches,
        ) as contest:
            shuffler = random.Random(seed)
            for _ in range(given.launches):
                contest.prepare(lambda done: None)
                contest.check(batch, lambda *_: None)
                contest.time(len(batch), given.duration, shuffler, lambda done: None)
            measured = contest.measurements((50,))
    if contest.left_out:
        whys = [f"{name} is left out: {why}" for name, why in contest.left_out.items()]
        raise BackendUnavailable("; ".join(whys))
    return BenchReport(machine(), "", seed, measured).against(entrants[1].name)


def judge(now: BenchReport, then: BenchReport, given: argparse.Namespace) -> Comparison:
    """As `fastres bench --compare` does, through the file."""
    lanes = {OURS: tuple(given.peers.split(","))}
    document = {
        "command": "bench",
        "schema": SCHEMA,
        "lanes": lanes,
        "run": {"finished": True, "transfers": "not included"},
        **then.to_dict(),
    }
    base = msgspec.json.decode(json_text(document).encode(), type=Base)
    return compare(now.measurements, lanes, base, "base", given.limit)


def trial(given: argparse.Namespace, number: int, engines: dict[str, Path]) -> Trial:
    started = time.time()
    base, same = (run(given, 3 * number + i, engines[given.model]) for i in range(2))
    seconds = (time.time() - started) / 2
    slowed = run(given, 3 * number + 2, engines[given.slower])
    (equal,), (planted,) = (judge(r, base, given).rows for r in (same, slowed))
    ratios = zip(_ratios(base), _ratios(same), strict=True)
    agree = all(a.overlaps(b) for a, b in ratios)
    return Trial(
        equal.change, equal.verdict, planted.change, planted.verdict, agree, round(seconds, 1)
    )


def _ratios(report: BenchReport) -> list[Ratio]:
    """Ours over each peer."""
    (size,) = report.batch_sizes
    peers: list[Measurement] = [m for m in report.measurements if m.target != OURS]
    return [report.against(m.target).of(OURS, size).speedup for m in peers]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    _check(parser, given)
    trials: list[Trial] = []
    status = 0
    try:
        _run_all(given, trials)
    except BaseException as error:
        if is_interrupt(error):
            status, said = 130, "interrupted"
        elif isinstance(error, FastresError):
            status, said = 3 if isinstance(error, BackendUnavailable) else 2, f"error: {error}"
        else:
            raise
        print(f"{said}: {len(trials)} of {given.trials} trials are done", file=sys.stderr)
    if trials:
        _tell(trials, given)
    return status


def _run_all(given: argparse.Namespace, trials: list[Trial]) -> None:
    """Every trial, each written and told as soon as it is there."""
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        engines = {name: Path(folder, f"{i}") for i, name in enumerate((given.model, given.slower))}
        for name, path in engines.items():
            keep_engine(given, name, path)
        for number in range(given.trials):
            trials.append(trial(given, number, engines))
            _keep(trials, given, started)
            t = trials[-1]
            print(
                f"{number}: same {t.same} {t.same_verdict}, slowed {t.slowed} {t.slowed_verdict}, "
                f"agree {t.agree}, {t.seconds:.0f} s a run",
                file=sys.stderr,
                flush=True,
            )


def _keep(trials: Sequence[Trial], given: argparse.Namespace, started: float) -> None:
    if given.output is not None:
        finished = len(trials) == given.trials
        run = {"duration_s": given.duration, "launches": given.launches, "finished": finished}
        document = {
            **headed("guard_trials", started, transfers="not included", **run),
            "limit": given.limit,
            "model": given.model,
            "slower": given.slower,
            "trials": [asdict(t) for t in trials],
        }
        write_file(given.output, json_text(document) + "\n")


def _tell(trials: Sequence[Trial], given: argparse.Namespace) -> None:
    flagged = sum(t.same_verdict == "slower" for t in trials)
    caught = sum(t.slowed_verdict == "slower" for t in trials)
    agreeing = sum(t.agree for t in trials)
    seconds = max(t.seconds for t in trials)
    print(machine())
    print(f"{given.model} {given.precision}, batch {given.batch_size}, peers {given.peers}")
    print(f"equal runs called slower by more than {given.limit:.0%}: {flagged} of {len(trials)}")
    print(f"{given.slower} in its place caught: {caught} of {len(trials)}")
    print(f"equal runs whose intervals all overlap: {agreeing} of {len(trials)}")
    print(f"at most {seconds:.0f} s a run")


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Ends with status 2, before anything is run, where a flag does not fit."""
    check_output(parser, given.output)
    for flag, least in {"trials": 1, "image_size": 1, "batch_size": 1, "launches": 1}.items():
        if getattr(given, flag) < least:
            parser.error(f"--{flag.replace('_', '-')} must be at least {least}")
    if not 0 < given.limit < 1:
        parser.error(f"--limit is {given.limit}; give a fraction above 0 and below 1")
    if not 0 < given.duration < math.inf:
        parser.error(f"--duration is {given.duration}; give seconds, more than 0")
    for flag in ("model", "slower"):
        name = getattr(given, flag)
        try:
            with torch.device("meta"):
                untrained(name)
        except (AttributeError, TypeError, ValueError) as error:
            parser.error(f"--{flag} {name!r} is no network of fastres.models: {error}")
    peers = given.peers.split(",")
    for name in peers:
        if name not in PEERS:
            parser.error(f"--peers: there is no {name!r}; there are {', '.join(PEERS)}")
        if (why := refusal(name, given.precision, torch.device("cpu"))) is not None:
            parser.error(f"--peers: {why}")
    if len(set(peers)) < len(peers):
        parser.error(f"--peers {given.peers}: give each once")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.guard_trials", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--trials", type=int, default=20)
    add("--limit", type=float, default=0.05, help="that the guard is given, as a fraction")
    add("--model", default="cifar_resnet:62", help="of fastres.models")
    add("--slower", default="cifar_resnet:68", help="what ours runs in the third run")
    add("--image-size", type=int, default=32)
    add("--batch-size", type=int, default=8)
    add("--precision", choices=get_args(Precision), default="fp32")
    add("--peers", default="openvino")
    add("--launches", type=int, default=3)
    add("--duration", type=float, default=1.2)
    add("-o", "--output", type=Path, help="also write every trial as JSON")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
