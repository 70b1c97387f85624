"""What each precision costs settled ResNets: SQNR layer by layer, and of the logits.

Their weights are random, so top-1 says only whether two engines rank the classes alike.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.table import Table
from torch import Tensor

import fastres
from bench.pictures import PHOTOS
from fastres import models
from fastres.calib.decoding import decode
from fastres.calib.images import Preprocess, find_images
from fastres.errors import UnsupportedError
from fastres.parity.report import ParityReport
from fastres.text import render
from fastres.timing.machine import Machine, machine

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
WORST = 5
SETTLING, CALIBRATING, JUDGING = range(0, 8), range(100, 132), range(200, 216)  # crops, disjoint
AT_ONCE = 4


@dataclass(frozen=True)
class Parity:
    """One network in one precision against the model in float64.

    Args:
        failure: the first layer, or the output, that is past the tolerance policy; empty if none.
        sqnr_db, cosine, top1: of the logits; SQNR without their mean over the pictures.
        median_db: SQNR of the middle layer.
        worst: the layers of the lowest SQNR, lowest first.
    """

    network: str
    precision: str
    pictures: int
    failure: str
    sqnr_db: float
    cosine: float
    top1: float
    layers: int
    median_db: float
    worst: dict[str, float]

    @classmethod
    def of(cls, network: str, precision: str, report: ParityReport) -> Parity:
        logits, layers = report.outputs[0], sorted(report.layers, key=lambda row: row.sqnr_db)
        return cls(
            network,
            precision,
            report.images,
            failure_of(report),
            logits.sqnr_db,
            logits.cosine,
            logits.top1,
            len(layers),
            float(np.median([row.sqnr_db for row in layers])),
            {row.name: row.sqnr_db for row in layers[:WORST]},
        )


@dataclass(frozen=True)
class Parities:
    """All of them; `notes` say what is missing."""

    machine: Machine
    settings: dict[str, Any]
    rows: tuple[Parity, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        table = Table(
            title="settled networks on cpu against the model in float64",
            caption="SQNR without the mean over the crops, cosine with it; parity: error at most "
            "twice PyTorch's own in that precision, in int8 of the quantised graph",
        )
        columns = ("network", "precision", "parity", "logits SQNR dB", "cosine", "top-1 same")
        for column in (*columns, "median layer dB", "worst layers, dB"):
            table.add_column(column, no_wrap=column != "worst layers, dB")
        for row in self.rows:
            table.add_row(
                row.network,
                row.precision,
                "FAILED" if row.failure else "PASSED",
                f"{row.sqnr_db:.1f}",
                f"{row.cosine:.6f}",
                f"{row.top1:.1%}",
                f"{row.median_db:.1f} of {row.layers}",
                ", ".join(f"{name} {db:.1f}" for name, db in row.worst.items()),
            )
        failures = [f"{r.network} {r.precision}: {r.failure}" for r in self.rows if r.failure]
        lines = [render(table, width=170), *failures, *self.notes]
        return "\n".join([*lines, f"measured on {self.machine}"])


def on_settled(given: argparse.Namespace) -> Parities:
    """Each network in each precision that the CPU has."""
    rows, notes = list[Parity](), list[str]()
    judging = crops(JUDGING, given.crop).split(AT_ONCE)
    for depth in given.depths.split(","):
        name = f"resnet{depth}"
        model = getattr(models, name)(seed=given.seed)
        models.settle(model, crops(SETTLING, given.crop), seed=given.seed)
        table = fastres.quantize(model, crops(CALIBRATING, given.crop), seed=given.seed)
        for precision in PRECISIONS:
            how = {"calibration": table} if precision == "int8" else {}
            try:
                engine = fastres.compile(
                    model,
                    judging[0],
                    backend="cpu",
                    precision=precision,
                    threads=given.threads,
                    **how,
                )
            except UnsupportedError as error:
                said = f"no {precision}: {str(error).splitlines()[0]}"
                notes += [] if said in notes else [said]
                continue
            with engine:
                report = fastres.verify(model, engine, judging, layerwise=True)
            rows.append(Parity.of(name, precision, report))
        notes.append(f"{name} in int8: {table.algorithm} thresholds of {table.samples} crops")
    settings = {"depths": given.depths, "crop": given.crop, "seed": given.seed}
    return Parities(machine(), settings, tuple(rows), tuple(notes))


def failure_of(report: ParityReport) -> str:
    """Name and reason of the first layer past its bound, else of the output."""
    wrong = report.first_failing_layer or next((r for r in report.outputs if not r.passed), None)
    return "" if wrong is None else f"{wrong.name}: {wrong.reason}"


def crops(numbers: range, size: int) -> Tensor:
    """[N, 3, size, size] fp32: crops of the photographs, each fixed by its number."""
    preprocess = Preprocess(resize=None, crop=None)
    pictures = [decode(path) for path in find_images(PHOTOS)]
    return torch.stack([preprocess(_crop(pictures[i % len(pictures)], i, size)) for i in numbers])


def _crop(picture: Image.Image, number: int, size: int) -> Image.Image:
    draw = random.Random(number)
    side = int(min(picture.size) * draw.uniform(0.4, 1.0))
    left = draw.randint(0, picture.width - side)
    top = draw.randint(0, picture.height - side)
    box = (left, top, left + side, top + side)
    crop = picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return ImageOps.mirror(crop) if draw.random() < 0.5 else crop
