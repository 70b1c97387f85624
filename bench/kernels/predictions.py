"""What the cost model expects of ResNet-50's kernels on a GPU. Calculated; nothing is measured.

python -m bench.kernels.predictions [--gpu sm_90] [--batch-size 1,32,256]
                                    [--precision fp16,int8] [-o FILE]

A row is a distinct kernel of the plan that fastres would run: its tile, the microseconds of the
estimate by which tiles and forms are ranked, or of the roofline where a kernel has no estimate, and
what follows from them. The model ranks; no GPU has confirmed its times. Nothing is compiled.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.table import Table

import fastres
from bench.kernels.rates import Rates, rates
from bench.quantised import in_precision
from fastres import models
from fastres.backends.triton.planning.eight_bits import FLOAT_OF
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.overlap import LAUNCH_US
from fastres.backends.triton.planning.plan import AnyStep, LoadInput, Plan
from fastres.backends.triton.planning.problems import Problem
from fastres.backends.triton.planning.table import Tiles, shipped_for
from fastres.backends.triton.running.bind import bind, load_launch
from fastres.backends.triton.running.contexts import views
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.tuning.choosing import problem_of
from fastres.cli.output import check_folder, write_file
from fastres.errors import InputError
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.kernels.cost import Target
from fastres.kernels.launch import Launch
from fastres.kernels.tiles.chain import ChainShape
from fastres.options import Options, Precision
from fastres.text import render

LABEL = "PREDICTED by the cost model, not measured: no GPU ran any of this"
SIZE = 224


@dataclass(frozen=True)
class Row:
    """One distinct kernel of a plan.

    Args:
        kernel: its form, or its function's name.
        nodes: the graph's nodes that launch it.
        tile: how it is cut.
        estimated: whether a ranking estimate stands behind the time; else the roofline.
    """

    kernel: str
    shape: str
    tile: str
    nodes: tuple[str, ...]
    estimated: bool
    rates: Rates

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "rates": self.rates.to_dict()}


@dataclass(frozen=True)
class Prediction:
    """A network at one batch size in one precision.

    Args:
        launch_us: what launches cost besides, by the guess of `planning/overlap.py`; none where
            the plan's kernels overlap.
    """

    gpu: str
    precision: Precision
    batch_size: int
    rows: tuple[Row, ...]
    launch_us: float

    @property
    def kernel_us(self) -> float:
        """Of all launches."""
        return sum(len(row.nodes) * row.rates.microseconds for row in self.rows)

    @property
    def images_per_second(self) -> float:
        return 1e6 * self.batch_size / (self.kernel_us + self.launch_us)

    def to_dict(self) -> dict[str, Any]:
        """Fields for JSON, which say that they are no measurement."""
        return {
            "measured": False,
            **vars(self),
            "rows": [row.to_dict() for row in self.rows],
            "predicted_kernel_us": self.kernel_us,
            "predicted_images_per_second": self.images_per_second,
        }

    def __str__(self) -> str:
        title = f"ResNet-50 v1.5 in {self.precision}, batch {self.batch_size}, {self.gpu}; {LABEL}"
        table = Table(title=title, title_justify="left")
        for column in ("kernel", "for", "sizes", "tile"):
            table.add_column(column, overflow="fold")
        for column in ("x", "us", "TFLOP/s", "GB/s", "bound by", "of roofline"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            r = row.rates
            table.add_row(
                *(row.kernel, row.nodes[0], row.shape, row.tile, str(len(row.nodes))),
                f"{r.microseconds:.1f}{'' if row.estimated else '*'}",
                *(f"{r.tflops:.1f}", f"{r.gbs:.0f}", r.bound, f"{r.share_of_roofline:.0%}"),
            )
        return "\n".join(
            [
                render(table, width=160),
                "* the roofline itself: this kernel has no estimate. us: of one launch of x",
                f"predicted, not measured: {self.kernel_us:.0f} us of kernels and "
                f"{self.launch_us:.0f} us of launches, {self.images_per_second:.0f} images/s",
            ]
        )


def predict(graph: Graph, target: Target, precision: Precision, batch_size: int) -> Prediction:
    """The table of one network.

    Raises:
        UnsupportedError: the target has no kernels for it.
    """
    shape = (batch_size, 3, SIZE, SIZE)
    graph = in_precision(graph, (1, 3, 64, 64), precision)
    tiles = Tiles(target, shipped_for(target))
    plan = make_plan(graph, (shape,), precision, tiles)
    constants = Packed(graph, FLOAT_OF[precision], torch.device("meta"))
    rows: dict[tuple[str, str, str], Row] = {}
    for step, calls in _calls(plan, constants, target):
        row = _row(step, calls, plan, tiles)
        known = rows.setdefault((row.kernel, row.shape, row.tile), row)
        if known is not row:
            rows[row.kernel, row.shape, row.tile] = replace(known, nodes=known.nodes + row.nodes)
    launch_us = 0.0 if plan.dependent else LAUNCH_US * len(plan.steps)
    return Prediction(f"sm_{target.sm}", precision, batch_size, tuple(rows.values()), launch_us)


def _calls(
    plan: Plan, constants: Packed, target: Target
) -> Iterator[tuple[AnyStep, Sequence[Launch]]]:
    """Each step with its launches, in order; inputs come in as planes of fp32."""
    tensors = views(plan, torch.empty(plan.arena_bytes, dtype=torch.uint8, device="meta"))
    shapes = iter(plan.input_shapes)
    for step in plan.steps:
        if isinstance(step, LoadInput):
            given = torch.empty(next(shapes), device="meta")
            yield step, [load_launch(plan, step, given, tensors[step.target], constants)]
        else:
            yield step, bind(plan, step, tensors, constants, target)


def _row(step: AnyStep, calls: Sequence[Launch], plan: Plan, tiles: Tiles) -> Row:
    key = problem_of(plan, step.node)
    problem = next((problem for problem in tiles.asked() if problem.key == key), None)
    if problem is None:
        first, *_, last = calls[0].tensors()
        name = calls[0].kernel.__name__.strip("_").removesuffix("_kernel")
        shape = " -> ".join("x".join(map(str, tensor.shape)) for tensor in (first, last))
        tile, (seconds, _) = calls[0].tile, calls[0].least(tiles.target)
    else:
        best, name = tiles.best(problem), problem.kind
        shape = _sizes(problem)
        tile, seconds = str(best.tile), best.estimate  # whatever a table has measured
    found = rates(calls, seconds, tiles.target)
    return Row(name, shape, tile, (step.node,), problem is not None, found)


def _sizes(problem: Problem) -> str:
    """As in "n=32 28x28 128->512 3x3/2 +256 projected"."""
    shape = problem.shape
    pixels = f"n={shape.n} {shape.h}x{shape.w}"
    if isinstance(shape, ChainShape):
        channels = [shape.mid, shape.mid, shape.ko, *([shape.next_mid] if shape.next_mid else [])]
        step = f"/{shape.stride}" if shape.stride > 1 else ""
        more = f" +{shape.projected} projected" if shape.projected else " +residual"
        return f"{pixels} {'->'.join(map(str, channels))}{step}{more}"
    step = f"/{shape.stride[0]}" if shape.stride != (1, 1) else ""
    text = f"{pixels} {shape.c}->{shape.k} {shape.r}x{shape.s}{step}"
    if problem.projection is not None:
        text += f" +{problem.projection.channels} projected"
    return text + (" +residual" if problem.residual else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.predictions", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--gpu", default="sm_90", help="architecture of the GPU: sm_80 to sm_120")
    parser.add_argument("--batch-size", default="1,32,256")
    parser.add_argument("--precision", default="fp16,int8", help=", ".join(get_args(Precision)))
    parser.add_argument("-o", "--output", type=Path, help="also write everything as JSON")
    return parser


def _asked(
    parser: argparse.ArgumentParser, given: argparse.Namespace
) -> tuple[Target, list[Precision], list[int]]:
    """What was asked for; ends with status 2 where that makes no sense."""
    sizes = given.batch_size.split(",")
    if not all(size.isdecimal() and len(size) < 19 and int(size) > 0 for size in sizes):
        parser.error(f"--batch-size {given.batch_size}: expected positive numbers, as 1,32,256")
    try:
        if given.output is not None:
            given.output.parent.mkdir(parents=True, exist_ok=True)
        check_folder(given.output)
    except (InputError, OSError) as error:
        parser.error(f"-o {given.output}: {error}")
    precisions = given.precision.split(",")
    if unknown := set(precisions) - set(get_args(Precision)):
        known = ", ".join(get_args(Precision))
        parser.error(f"--precision {', '.join(sorted(unknown))}: the precisions are {known}")
    try:
        target = Target.typical(Options(target=given.gpu).sm or 0)
    except ValueError as error:  # of fastres, too: an InputError is one
        parser.error(f"--gpu {given.gpu}: {error}")
    if "fp8" in precisions and target.sm < 89:
        parser.error(
            f"--precision fp8: {given.gpu} has no products of fp8, expected sm_89 or newer"
        )
    return target, precisions, [int(size) for size in sizes]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    target, precisions, sizes = _asked(parser, given)
    graph = optimise(fastres.build(models.resnet50(seed=0).state_dict(), version="v1.5"))
    found = []
    for precision in precisions:
        for size in sizes:
            try:
                found.append(predict(graph, target, precision, size))
            except ValueError as error:  # sizes beyond what kernels count
                parser.error(f"--batch-size {size}: {error}")
            print(found[-1], flush=True)
    if given.output is not None:
        fields = {"note": LABEL, "predictions": [one.to_dict() for one in found]}
        try:
            write_file(given.output, json.dumps(fields, indent=1) + "\n")
        except InputError as error:
            parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
