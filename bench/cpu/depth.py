"""Compile time against depth: torch.export's share and ours, and whether ours grows linearly.

python -m bench.cpu.depth [--depths 110,302,602,1202] [-o depth.json]
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.table import Table

from bench.cpu.fits import linear_fit
from fastres.backends.cpu import CpuBackend
from fastres.graph.capture import capture
from fastres.graph.passes.pipeline import optimise
from fastres.models import cifar_resnet
from fastres.options import Options
from fastres.text import render
from fastres.timing.machine import machine

T = TypeVar("T")
PARTS = ("export", "read", "passes", "lower")
SHAPE = (2, 3, 32, 32)


def timed(work: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(depth: int) -> dict[str, float]:
    """Seconds of each part of compiling cifar_resnet(depth); `ours` is all but export."""
    model, x = cifar_resnet(depth, seed=0).eval(), torch.zeros(SHAPE)
    free = ({0: torch.export.Dim.AUTO},)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's notes on its own internals
        export, program = timed(lambda: torch.export.export(model, (x,), dynamic_shapes=free))
    read, captured = timed(lambda: capture(program, ()))
    passes, graph = timed(lambda: optimise(captured.graph))
    options = Options(precision="fp32")
    lower, _ = timed(lambda: CpuBackend().lower(graph, options, (SHAPE,)))
    seconds = dict(zip(PARTS, (export, read, passes, lower), strict=True))
    return {"depth": depth, **seconds, "ours": read + passes + lower}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.depth", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--depths", default="110,302,602,1202", help="of cifar_resnet: 6n + 2")
    parser.add_argument("-o", "--output", type=Path, help="also write the figures as JSON")
    given = parser.parse_args(arguments)

    measure(8)  # imports and first-time work of torch.export and OpenVINO
    rows = [measure(int(depth)) for depth in given.depths.split(",")]
    table = Table(title="seconds to compile", caption="ours = read + passes + lower")
    for column in ("depth", *PARTS, "ours"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["depth"]), *(f"{row[part]:.2f}" for part in (*PARTS, "ours")))
    print(machine())
    print(render(table))
    found: dict[str, Any] = {"machine": str(machine()), "rows": rows, "fits": {}}
    for part in ("export", "ours") if len(rows) > 1 else ():
        fit = linear_fit([row["depth"] for row in rows], [row[part] for row in rows])
        found["fits"][part] = asdict(fit)
        print(f"{part}: {1e3 * fit.slope:.2f} ms a layer, {fit.intercept:+.2f} s, R^2 {fit.r2:.4f}")
    if given.output is not None:
        given.output.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
