"""How the time of one call grows: with the batch, the image, the depth and the threads.

python -m bench.cpu.scaling [--series batch,...] [--model resnet50] [--precision fp32] [-o FILE]

The points of a series take turns in one process, pinned to its cores, a pause before each turn.
Each has the median of its rounds and a 95 % interval; through them goes the straight line of least
squares, but for threads, where time does not grow. The file is written after each series, so that
an interrupt, exit status 130, keeps those that are done. `fastres report FILE.json` draws them.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.table import Table

import fastres
from bench.cpu.fits import Fit, linear_fit
from bench.documents import check_output, headed
from bench.pictures import photographs
from fastres import models
from fastres.backends.select import BACKENDS
from fastres.cli.models import is_cifar, make
from fastres.cli.output import write_file
from fastres.errors import FastresError, is_interrupt
from fastres.graph.cost import multiply_adds
from fastres.graph.shapes import infer_shapes
from fastres.options import Options, Precision
from fastres.text import json_text, render
from fastres.timing.contest import PAUSE
from fastres.timing.machine import cores, machine
from fastres.timing.statistics import bootstrap
from fastres.timing.turns import Here, Rounds, interleave


@dataclass(frozen=True)
class Point:
    """Milliseconds of one call, and their 95 % interval."""

    x: float
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """One thing varied, all else equal."""

    name: str
    target: str
    x_label: str
    unit: str
    points: tuple[Point, ...]
    fit: Fit | None


def measure(
    name: str, target: str, x_label: str, calls: dict[float, Here], given: argparse.Namespace
) -> Series:
    """Times the points of a series in turns."""
    timed: dict[str, Rounds] = {}
    shuffler = random.Random(given.seed)
    with torch.no_grad():
        interleave(
            list(calls.values()),
            given.duration,
            shuffler,
            lambda done: None,
            timed,
            pause_s=PAUSE,
        )
    points = []
    for x, call in calls.items():
        found = bootstrap([1e3 * float(np.median(turn)) for turn in timed[call.name]], given.seed)
        points.append(Point(x, found.median, found.low, found.high))
    fitted = len(points) > 2 and name != "threads"
    fit = linear_fit([p.x for p in points], [p.median for p in points]) if fitted else None
    return Series(name, target, x_label, "ms", tuple(points), fit)


def batch(precision: Precision, given: argparse.Namespace) -> Series:
    size = _side(given)
    engine = _engine(given.model, precision, size, given)
    calls = {n: Here(str(n), engine, _pictures(n, size, engine)) for n in given.batch_sizes}
    return measure("batch", _named(given, precision, size), "images in a batch", calls, given)


def image_size(precision: Precision, given: argparse.Namespace) -> Series:
    calls = {}
    for size in given.image_sizes:
        engine = _engine(given.model, precision, size, given)
        calls[size * size / 1e3] = Here(str(size), engine, _pictures(1, size, engine))
    return measure("image size", _named(given, precision), "thousand pixels", calls, given)


def depth(precision: Precision, given: argparse.Namespace) -> Series:
    """ResNet-18 to -152: of different blocks, so that work is what grows."""
    calls = {}
    for layers in given.depths:
        engine = _engine(f"resnet{layers}", precision, 224, given)
        calls[_work(engine)] = Here(f"resnet{layers}", engine, _pictures(1, 224, engine))
    return measure("depth", f"{precision}, 224 pixels", "billion multiply-adds", calls, given)


def depth_cifar(precision: Precision, given: argparse.Namespace) -> Series:
    calls = {}
    for layers in given.cifar_depths:
        engine = _engine(f"cifar_resnet{layers}", precision, 32, given)
        calls[layers] = Here(str(layers), engine, _pictures(1, 32, engine))
    return measure("depth of CIFAR nets", f"{precision}, 32 pixels", "layers", calls, given)


def threads(precision: Precision, given: argparse.Namespace) -> Series:
    calls, size = {}, _side(given)
    for count in range(1, Options().num_threads + 1):
        engine = _engine(given.model, precision, size, given, threads=count)
        calls[count] = Here(str(count), engine, _pictures(1, size, engine))
    return measure("threads", _named(given, precision, size), "threads", calls, given)


SERIES = {
    "batch": batch,
    "image_size": image_size,
    "depth": depth,
    "depth_cifar": depth_cifar,
    "threads": threads,
}


def _work(engine: fastres.Engine) -> float:
    """Billions of multiply-adds for one picture."""
    shapes = infer_shapes(engine.graph, [(1, *engine.inputs[0].usual[1:])])
    return sum(multiply_adds(node, shapes, engine.graph) for node in engine.graph.nodes) / 1e9


def _engine(
    name: str, precision: Precision, size: int, given: argparse.Namespace, **more: Any
) -> fastres.Engine:
    """Of random weights: how long it takes does not depend on them."""
    model = _network(name)
    x = photographs(2, size)
    if precision == "int8":
        models.settle(model, x)
        more["calibration"] = [x]
    return fastres.compile(model, x, backend=given.backend, precision=precision, **more)


def _network(name: str) -> torch.nn.Module:
    return make(f"fastres:{name}")


def _pictures(count: int, size: int, engine: fastres.Engine) -> torch.Tensor:
    return photographs(count, size).to(engine.device)


def _side(given: argparse.Namespace) -> int:
    """Of the pictures that --model takes."""
    return 32 if is_cifar(given.model) else 224


def _named(given: argparse.Namespace, precision: Precision, size: int | None = None) -> str:
    return f"{given.model} {precision}" + (f", {size} pixels" if size else "")


def table(found: Sequence[Series]) -> str:
    shown = Table(title="milliseconds of one call, median over rounds and 95 % interval")
    for column in ("varied", "target", "points", "straight line"):
        shown.add_column(column)
    for s in found:
        points = "\n".join(f"{p.x:g}: {p.median:.3g} [{p.low:.3g}, {p.high:.3g}]" for p in s.points)
        line = ""
        if s.fit is not None:
            line = f"{s.fit.slope:.4g} ms for each of {s.x_label}, {s.fit.intercept:+.3g} ms\n"
            line += f"R² {s.fit.r2:.4f}, off by {100 * s.fit.worst:.1f} % at most"
        shown.add_row(f"{s.name}, in {s.x_label}", s.target, points, line)
        shown.add_section()
    return render(shown, width=140)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    _check(parser, given)
    started, status = time.time(), 0
    jobs = [(name, precision) for name in given.series for precision in given.precision]
    found: list[Series] = []
    try:
        with pinned(cores(Options().num_threads)):
            for name, precision in jobs:
                found.append(SERIES[name](precision, given))
                keep(found, given, started, finished=len(found) == len(jobs))
                print(f"{name} in {precision} is done", file=sys.stderr, flush=True)
    except BaseException as error:
        if is_interrupt(error):
            status = 130
            said = "interrupted"
        elif isinstance(error, FastresError):
            status = 2
            said = f"error: {error}"
        else:
            raise
        print(f"{said}: {len(found)} of {len(jobs)} series are done", file=sys.stderr)
    if found:
        print(machine())
        print(table(found))
    return status


@contextmanager
def pinned(cpus: Sequence[int]) -> Iterator[None]:
    """This thread, and all that it starts, run on these."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def keep(
    found: Sequence[Series], given: argparse.Namespace, started: float, finished: bool
) -> None:
    """Writes what there is so far, if a file is wanted."""
    if given.output is None:
        return
    run = {"duration_s": given.duration, "seed": given.seed, "finished": finished}
    document = {
        **headed("scaling", started, transfers="not included", **run),
        "series": [asdict(series) for series in found],
    }
    write_file(given.output, json_text(document) + "\n")


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Ends with status 2, before anything is measured, where something would fail later."""
    check_output(parser, given.output)
    try:
        for precision in given.precision:  # of a small network: does the backend take it here?
            _engine("cifar_resnet8", precision, 32, given).close()
    except FastresError as error:
        parser.error(str(error))


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of at least 1, by comma")
    return list(dict.fromkeys(found))


def _depths(text: str) -> list[int]:
    for depth in (found := _numbers(text)):
        _model(f"resnet{depth}")
    return found


def _cifar_depths(text: str) -> list[int]:
    for depth in (found := _numbers(text)):
        _model(f"cifar_resnet{depth}")
    return found


def _model(text: str) -> str:
    try:
        with torch.device("meta"):
            _network(text)
    except FastresError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: give seconds, more than 0")
    return found


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of at least 0")
    return int(text)


def _some_of(known: Sequence[str], text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"there is no {', '.join(unknown)}; there are {', '.join(known)}"
        )
    return names


def _series(text: str) -> list[str]:
    return _some_of(list(SERIES), text)


def _precisions(text: str) -> list[str]:
    return _some_of(get_args(Precision), text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.scaling", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--series", type=_series, default=list(SERIES), help=f"any of {','.join(SERIES)}")
    add(
        "--model",
        type=_model,
        default="resnet50",
        help="resnet50, cifar_resnet56@v1 and so on, where depth does not vary",
    )
    add("--precision", type=_precisions, default=["fp32", "bf16"])
    add("--backend", choices=["auto", *BACKENDS], default="auto")
    add("--batch-sizes", type=_numbers, default=[1, 2, 4, 8, 16, 32])
    add("--image-sizes", type=_numbers, default=[96, 128, 160, 224, 288, 384])
    add("--depths", type=_depths, default=[18, 34, 50, 101, 152])
    add("--cifar-depths", type=_cifar_depths, default=[110, 302, 602, 1202])
    add("--duration", type=_seconds, default=2.0, help="seconds for each point")
    add("--seed", type=_seed, default=0)
    add("-o", "--output", type=Path, help="also write everything as JSON")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
