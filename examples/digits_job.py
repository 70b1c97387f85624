"""What int8 costs trained networks and what it gives: accuracy and speed beside fp32 and bf16.

    python examples/digits_job.py

The networks of examples/weights, calibrated on digits that they learnt from, judged by the fifth of
the digits that they have not seen, as it is and damaged in each way of corruptions.py.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corruptions import KINDS, corrupted
from datasets import digits, split
from networks import facts_of, network, preprocess_of, take_over
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastres
from fastres.engine.engine import Engine
from fastres.errors import FastresError, UnsupportedError
from fastres.options import Input
from fastres.source import source_of

WEIGHTS = Path(__file__).parent / "weights"
NAMES = ("resnet20", "bottleneck")
PRECISIONS = ("fp32", "bf16", "int8")
BASELINE = PRECISIONS[0]
CALIBRATION = 512  # pictures
AT_ONCE = 64  # pictures of one call, timed and judged


@dataclass(frozen=True)
class Score:
    """Shares of right answers to clean and to damaged pictures, and of answers that are fp32's."""

    clean: float
    damaged: float
    same: float


def show(console: Console, duration: float) -> None:
    """Prints accuracy and speed of each network; what cannot run here is named.

    Args:
        duration: seconds that each engine is timed.
    """
    table = Table(title=f"trained on digits, batch {AT_ONCE}: accuracy and speed, fp32 to int8")
    for column in ("net", "clean", "damaged", "same as fp32", "p50 ms", "img/s", "against fp32"):
        table.add_column(column, justify="left" if column == "net" else "right", no_wrap=True)
    for name in NAMES:
        with console.status(f"{name}: calibrating, evaluating, timing"):
            count = _rows(table, name, console, duration)
        table.add_section()
    table.caption = (
        f"{count} digits that the networks have not seen, {len(KINDS)} kinds of damage to each; "
        "same: answers, right or wrong"
    )
    console.print(table)


def _rows(table: Table, name: str, console: Console, duration: float) -> int:
    """Adds a network's rows; returns how many pictures judged it."""
    engines = compiled(name, console)
    x, labels = inputs(name)
    classes = {precision: answers(engine, x) for precision, engine in engines.items()}
    batch = x[0, :AT_ONCE].to(next(iter(engines.values())).device)
    timed = fastres.benchmark(engines, {AT_ONCE: batch}, duration_s=duration, baseline=BASELINE)
    for precision, engine in engines.items():
        found = score(classes[precision], classes[BASELINE], labels)
        measured = timed.of(precision, AT_ONCE)
        base = precision == BASELINE
        table.add_row(
            f"{name} {precision}",
            f"{found.clean:.2%}",
            f"{found.damaged:.2%}",
            "" if base else f"{found.same:.2%}",
            f"{measured.latency_ms['p50']:.2f}",
            f"{measured.throughput:.0f}",
            "1x" if base else str(measured.speedup),
        )
        engine.close()
    for line in timed.unsteady:
        console.print(f"{name}, {line}")
    return len(labels)


def compiled(name: str, console: Console) -> dict[str, Engine]:
    """The network in each precision that runs here, by precision."""
    everything = digits()
    file = WEIGHTS / f"digits_{name}.safetensors"
    model, preprocess = network(name), preprocess_of(facts_of(file))
    take_over(model, file)
    assert preprocess is not None
    graph = source_of(model.eval(), Input((AT_ONCE, 3, 32, 32))).graph
    learnt = everything.images[split(everything.labels, 0.2, 0)[0]]
    chosen = np.random.default_rng(0).permutation(len(learnt))[:CALIBRATION]
    table = fastres.quantize(graph, preprocess.batch(list(learnt[chosen])))
    found: dict[str, Engine] = {}
    for precision in PRECISIONS:
        how: dict[str, Any] = {"calibration": table} if precision == "int8" else {}
        try:
            found[precision] = fastres.compile(graph, precision=precision, **how)
        except UnsupportedError as error:
            console.print(f"{name} {precision} is left out: {str(error).splitlines()[0]}")
    return found


def held_out() -> tuple[np.ndarray, np.ndarray]:
    """The digits that the networks have not seen: uint8 [1 + kinds, N, H, W, 3], clean first; [N].

    Damaged as for the figures of weights/README.md.
    """
    everything = digits()
    part = everything.take(split(everything.labels, 0.2, 0)[1])
    damaged = (corrupted(part.images, kind, 0) for kind in KINDS)
    return np.stack([part.images, *damaged]), part.labels


def inputs(name: str) -> tuple[Tensor, np.ndarray]:
    """The same as the network takes them: fp32 [1 + kinds, N, 3, H, W]; labels [N]."""
    preprocess = preprocess_of(facts_of(WEIGHTS / f"digits_{name}.safetensors"))
    assert preprocess is not None
    pictures, labels = held_out()
    return torch.stack([preprocess.batch(list(images)) for images in pictures]), labels


def answers(engine: Engine, x: Tensor) -> np.ndarray:
    """The class that an engine gives each picture of [V, N, 3, H, W]: [V, N]."""
    parts = [engine(part.to(engine.device)).cpu() for part in x.flatten(0, 1).split(AT_ONCE)]
    found: np.ndarray = torch.cat(parts).argmax(1).reshape(x.shape[:2]).numpy()
    return found


def score(own: np.ndarray, base: np.ndarray, labels: np.ndarray) -> Score:
    """Of answers [1 + kinds, N], clean first, against labels [N] and another's answers."""
    right = own == labels
    return Score(float(right[0].mean()), float(right[1:].mean()), float((own == base).mean()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--duration", type=float, default=2.0, help="seconds an engine is timed")
    args = parser.parse_args()
    show(Console(width=None if sys.stdout.isatty() else 110), args.duration)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FastresError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
