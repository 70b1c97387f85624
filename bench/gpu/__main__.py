"""Everything that a GPU is to be asked, in one run: right first, then tuned, then how fast.

python -m bench.gpu [--plan all|first|second] [--out DIR] [--carry DIR] [--budget SECONDS]
                    [--only SECTION,...] [--cache FILE]  (or: make gpu, make gpu-first, ...)

Each section runs in a process of its own and adds lines to DIR/gpu.jsonl; a run that was broken
off goes on where it was: a line with "error" is no result, and is asked again. It needs PyTorch,
Triton and this package, no network and no OpenVINO. The exit status is 1 if a result was wrong, in
this run or in an earlier one with the same DIR: once it is mended, give another DIR or take the
wrong line out. It is 130 after an interrupt.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from bench.children import environment
from bench.gpu.cache.archive import unpack
from bench.gpu.carry import carrying
from bench.gpu.plans import EVERYTHING, PLANS, Asked
from bench.gpu.quoted import SPARE_S
from bench.gpu.run import Row, Run, keep, latest
from bench.gpu.sections import NETS, PRECISIONS, SECTIONS
from fastres.backends.triton.tuning.choosing import tiles_for
from fastres.errors import DeviceLost, is_interrupt
from fastres.options import Options

INTERRUPTED = 130
LOST = 3  # a section's status where the GPU answers its process no more
RESTARTS = 3  # of a section whose GPU was lost
BATCH_SIZES = (256, 1, 32, 8, 128)
HUNG_S = 30  # after its time, a section is interrupted
ENDING_S = SPARE_S + 5  # for a section to end then: it may have to end a command of its own


def work(section: str, run: Run) -> int:
    """One section in this process: its rows, each kept as soon as it is there."""
    known = latest(run.out, section)
    try:
        for row in _new(SECTIONS[section](run), known, run.until):
            known[row["name"]] = row
            run.keep(section, row)
            said = row.get("error") or row.get("table", "")
            print(section, row["name"], row.get("right", ""), said, flush=True)
    except OutOfTime:
        run.keep(section, {"name": "stopped", "error": "out of time"})
    except BaseException as error:
        interrupt = is_interrupt(error)
        why = "interrupted" if interrupt else traceback.format_exc()[-2000:]
        run.keep(section, {"name": "stopped", "error": why})
        if isinstance(error, DeviceLost):
            return LOST
        return INTERRUPTED if interrupt else 1
    return int(any(map(_wrong, known.values())))


class OutOfTime(Exception):
    """A section has more to ask than there was time for."""


def _new(
    rows: Generator[Row, bool | None, None], known: dict[str, Row], until: float
) -> Iterator[Row]:
    """Rows that are not known yet; what is known and asked for is not worked out again.

    Raises:
        OutOfTime: there is no time to see whether there is more.
    """
    answer = None
    while time.time() < until:
        try:
            row = rows.send(answer)
        except StopIteration:
            return
        before = known.get(row["name"])
        finished = before is not None and "error" not in before
        answer = finished if row.pop("asked", False) else None
        if answer is None and not (finished and not _wrong(before)):
            yield row
    raise OutOfTime


def _wrong(row: Row) -> bool:
    return row.get("right") is False


def drive(given: argparse.Namespace) -> int:
    """Every section in turn, within the budget."""
    plan = PLANS[given.plan]
    budget = given.budget or plan.budget
    end, status, more = time.time() + budget, 0, max(1.0, budget / plan.budget)
    if given.cache is not None:
        _unpack(given)
    sections = _asked(given)
    for asked in sections:
        section, left = asked.section, end - time.time()
        if left < 10:
            print(f"{section}: no time left", flush=True)
            continue
        alone = len(sections) == 1 or asked.seconds is None
        limit = left if alone else min(left, more * (asked.seconds or left))
        told = [f"--{name}={value}" for name, value in _told(given, asked).items()]
        command = [sys.executable, "-m", "bench.gpu", *told, "--section", section]
        ended = _restarted(section, command, time.time() + limit)
        if ended == INTERRUPTED:
            print(f"{section}: interrupted", flush=True)
            return INTERRUPTED
        if ended is None:
            print(f"{section}: hung, and was stopped", flush=True)
        status = max(status, int(ended != 0))
    for section in dict.fromkeys(asked.section for asked in sections):
        for name in (name for name, row in latest(given.out, section).items() if _wrong(row)):
            print(f"{section}: {name} is wrong", flush=True)
            status = 1
    return status


def _restarted(section: str, command: Sequence[str], until: float) -> int | None:
    """A section's exit status; where its GPU is lost, another process goes on behind the question.

    The row of that question is there, and wrong, so it is not asked again.
    """
    command = [*command, "--until", str(until)]
    for left in reversed(range(RESTARTS + 1)):
        ended = _section(command, until + HUNG_S - time.time())
        if ended != LOST:
            return ended
        again = left and time.time() + 10 < until
        print(f"{section}: the GPU was lost; {'goes on' if again else 'ends'} there", flush=True)
        if not again:
            break
    return LOST


def _unpack(given: argparse.Namespace) -> None:
    """Machine code that was made elsewhere, for Triton's cache: a row, whether it fits or not."""
    sm = tiles_for(Options(), torch.device(given.device)).target.sm
    row = unpack(given.cache, _triton_cache(given), sm)
    keep(given.out, "cache", row)
    print("cache", row["name"], row.get("refused") or f"{row['kernels']} kernels", flush=True)


def _triton_cache(given: argparse.Namespace) -> Path:
    return Path(os.environ.get("TRITON_CACHE_DIR", given.out / "triton_cache")).resolve()


def _section(command: list[str], seconds: float) -> int | None:
    """A section's exit status; None where it had to be stopped."""
    process = subprocess.Popen(command, env=environment())
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        return None
    except KeyboardInterrupt:
        with suppress(subprocess.TimeoutExpired):  # a terminal has sent it to the section, too
            process.wait(ENDING_S)
        _end(process)
        return INTERRUPTED


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupted first, so that it ends what it has started."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(ENDING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _asked(given: argparse.Namespace) -> list[Asked]:
    """The sections of the plan, or those that were named: as the plan has them, if it does."""
    if given.only is None:
        return list(PLANS[given.plan].sections)
    found: list[Asked] = []
    for section in given.only.split(","):
        own = [asked for asked in PLANS[given.plan].sections if asked.section == section]
        found += own or [asked for asked in EVERYTHING.sections if asked.section == section]
    return found


def _told(given: argparse.Namespace, asked: Asked) -> dict[str, str]:
    """What a section is told: the caller's words first, then the plan's, then what is usual."""
    return {
        "out": given.out,
        "device": given.device,
        "nets": given.nets or ",".join(asked.nets or NETS),
        "precisions": given.precisions or ",".join(asked.precisions or PRECISIONS),
        "batch-sizes": given.batch_sizes or ",".join(map(str, asked.batch_sizes or BATCH_SIZES)),
        "image-size": given.image_size,
        "groups": given.groups or ",".join(asked.groups),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="where results go")
    parser.add_argument("--plan", choices=PLANS, default="all", help="what is asked, in order")
    parser.add_argument("--carry", type=Path, help="a folder kept up to date with the results")
    parser.add_argument("--budget", type=float, help="seconds in all; sections get more of more")
    parser.add_argument("--cache", type=Path, help="kernels that bench.gpu.cache compiled")
    parser.add_argument("--only", help=f"some sections, in order, of {', '.join(SECTIONS)}")
    parser.add_argument("--device", default="cuda", help="cpu with TRITON_INTERPRET=1, for tests")
    parser.add_argument("--nets")
    parser.add_argument("--precisions")
    parser.add_argument("--batch-sizes")
    parser.add_argument("--groups", default="", help=argparse.SUPPRESS)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.only is not None and not set(given.only.split(",")) <= set(SECTIONS):
        parser.error(f"--only {given.only}: the sections are {', '.join(SECTIONS)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "there is no CUDA device here; to try the script: TRITON_INTERPRET=1 and "
            "--device cpu with small --nets and --image-size"
        )
    given.out.mkdir(parents=True, exist_ok=True)
    if given.section is None:
        with carrying(given.out, given.carry):
            return drive(given)
    os.environ["TRITON_CACHE_DIR"] = str(_triton_cache(given))
    told = _told(given, Asked(given.section, None))
    run = Run(
        given.out,
        torch.device(given.device),
        told["nets"].split(","),
        told["precisions"].split(","),
        [int(size) for size in told["batch-sizes"].split(",")],
        given.image_size,
        given.until,
        tuple(filter(None, told["groups"].split(","))),
    )
    return work(given.section, run)


if __name__ == "__main__":
    raise SystemExit(main())
