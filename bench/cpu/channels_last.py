"""A model in channels_last beside its contiguous twin: how long each compiles, and runs, in turns.

python -m bench.cpu.channels_last [--models resnet18,resnet50] [--rounds 7] [--calls 60]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table

import fastres
from bench.pictures import photographs
from fastres.cli.models import make
from fastres.models import settle
from fastres.text import render
from fastres.timing.machine import machine
from fastres.timing.statistics import bootstrap

SEED = 0


def in_turns(calls: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Milliseconds of each call, round by round."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            own.append(1e3 * (time.perf_counter() - start))
    return times


def row(name: str, what: str, times: list[list[float]]) -> list[str]:
    plain, last = times
    ratio = bootstrap([b / a for a, b in zip(plain, last, strict=True)], SEED)
    return [
        name,
        what,
        *(f"{float(np.median(own)):.1f}" for own in times),
        f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.channels_last", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--models", default="fastres:resnet18,fastres:resnet50")
    parser.add_argument("--rounds", type=int, default=7, help="of compiling")
    parser.add_argument("--calls", type=int, default=60, help="of the engines")
    given = parser.parse_args(arguments)
    table = Table(title="milliseconds, medians; the ratio is of paired turns, 95 % interval")
    for column in ("model", "what", "contiguous", "channels_last", "channels_last / contiguous"):
        table.add_column(column)
    x = photographs(4)
    for name in given.models.split(","):
        plain = settle(make(name), x)
        twins = (plain, copy.deepcopy(plain).to(memory_format=torch.channels_last))
        compiling = [lambda model=model: fastres.compile(model, x[:1]).close() for model in twins]
        in_turns(compiling, 1)  # imports and first-time work of torch.export and OpenVINO
        table.add_row(*row(name, "compile", in_turns(compiling, given.rounds)))
        engines = [fastres.compile(model, x[:1]) for model in twins]
        same = torch.equal(engines[0](x[:1]), engines[1](x[:1]))
        running = [lambda engine=engine: engine(x[:1]) for engine in engines]
        in_turns(running, 5)
        what = "run, same bits" if same else "run, OTHER BITS"
        table.add_row(*row(name, what, in_turns(running, given.calls)))
    print(machine())
    print(render(table))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
