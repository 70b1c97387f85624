"""What every section is told and what it keeps: runs, rows, networks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastres
from bench.pictures import photographs
from bench.quantised import in_precision
from fastres import models
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.problems import Problem
from fastres.backends.triton.planning.table import Tiles
from fastres.graph.passes.pipeline import optimise
from fastres.kernels import cost
from fastres.options import Precision

Row = dict[str, Any]
PARITY_BATCH = 4
TRIED = 10  # tiles of a problem
FAST: tuple[Precision, ...] = ("fp16", "int8")  # tuned and timed


@dataclass(frozen=True)
class Run:
    """What was asked for, and when to stop."""

    out: Path
    device: torch.device
    nets: Sequence[str]
    precisions: Sequence[Precision]
    batch_sizes: Sequence[int]
    image_size: int
    until: float
    groups: Sequence[str] = ()  # of questions, those whose names begin so; all if empty

    @property
    def tuned(self) -> str:
        """The network whose problems are tuned, and which is timed."""
        return "resnet50" if "resnet50" in self.nets else self.nets[0]

    def rows(self, section: str) -> list[Row]:
        """Results of earlier runs and of this one, the last of each name."""
        return list(latest(self.out, section).values())

    def keep(self, section: str, row: Row) -> None:
        keep(self.out, section, row)


def keep(out: Path, section: str, row: Row) -> None:
    """Adds a row to those of a folder."""
    path = out / "gpu.jsonl"
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps({"section": section, **row}) + "\n")


def latest(out: Path, section: str) -> dict[str, Row]:
    """The last line of each name, of all runs with that folder."""
    path = out / "gpu.jsonl"
    rows: dict[str, Row] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):  # a line that was broken off with its run
            if (row := json.loads(line))["section"] == section:
                rows[row["name"]] = row
    return rows


def settled(name: str, version: str, run: Run) -> nn.Module:
    """A network whose statistics fit the photographs, so that its numbers can go wrong."""
    model = made(name, version)
    return models.settle(model, photographs(3, run.image_size))


def made(name: str, version: str) -> nn.Module:
    factory, _, depth = name.partition(":")
    arguments = (int(depth),) if depth else ()
    more = {"version": version} if name.startswith("resnet") and name[6:] in _BOTTLENECKS else {}
    model: nn.Module = getattr(models, factory)(*arguments, seed=0, **more)
    return model


_BOTTLENECKS = ("50", "101", "152")


def versions(name: str) -> tuple[str, ...]:
    return ("v1.5", "v1") if name.startswith("resnet") and name[6:] in _BOTTLENECKS else ("v1.5",)


def problems(
    version: str,
    batch: int,
    precisions: Sequence[Precision],
    image_size: int,
    target: cost.Target,
    net: str = "resnet50",
    library: str | None = None,
) -> list[Problem]:
    """What plans of a network want tiles for, in those of the precisions that are tuned.

    Args:
        library: the vendor's that is there (`vendor.library`), which is timed beside our kernels.
    """
    weights = made(net, version).state_dict()
    shape = (batch, 3, image_size, image_size)
    graph = optimise(fastres.build(weights, version=version, inputs=fastres.Input(shape)))
    tiles = Tiles(target, (), library)
    for precision in FAST:
        if precision in precisions:
            make_plan(in_precision(graph, shape, precision), (shape,), precision, tiles)
    return tiles.asked()
