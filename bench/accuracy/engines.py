"""One network in every precision and with every calibration algorithm, and what each answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import fastres
from bench.accuracy.report import AUTO, BASELINE, FIXED, KEPT, MAX_DROP
from fastres.calib.thresholds import ALGORITHMS
from fastres.engine.engine import Engine
from fastres.errors import BackendUnavailable, UnsupportedError
from fastres.graph.ir import Graph

BACKENDS = ("cpu", "triton")
Batches = Iterable[Tensor]


@dataclass(frozen=True)
class Material:
    """What engines are made from.

    Args:
        graph: the network, captured once for all its engines.
        calibration: pictures [N, 3, H, W] fp32, or batches of them that can be gone through again.
        validate: an engine's accuracy on pictures that are not those it is judged by; None leaves
            out the engine with `max_drop`.
    """

    graph: Graph
    calibration: Tensor | Batches
    samples: int
    validate: Callable[[Engine], float] | None = None


@dataclass
class Engines:
    """Engines by name, the baseline first.

    Args:
        chosen: algorithm that "auto" took by the calibration pictures, and that `max_drop` took.
        kept: layers that `max_drop` left in floating point.
        curve: what `validate` said: of the baseline, and of the engine that `max_drop` ended with.
        refused: why there is no engine, by name.
    """

    named: dict[str, Engine] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    curve: tuple[float, float] | None = None
    refused: dict[str, str] = field(default_factory=dict)


def engines(
    stack: ExitStack, material: Material, backend: str, *, threads: int, seed: int
) -> Engines:
    """Compiles all that a backend takes; `stack` closes them.

    One calibration serves all five algorithms. "auto" is `fastres.quantize`'s own choice among them
    by the calibration pictures alone, and so the one that is no choice in hindsight.
    """
    found = Engines()

    def add(name: str, **how: object) -> bool:
        try:
            engine = fastres.compile(material.graph, backend=backend, threads=threads, **how)
        except (BackendUnavailable, UnsupportedError) as error:
            found.refused[name] = _reason(error)
            return False
        found.named[name] = stack.enter_context(engine)
        return True

    if not add(BASELINE, precision="fp32"):
        return found
    add("bf16", precision="bf16")
    given = {"num_samples": material.samples, "seed": seed}
    table = fastres.quantize(material.graph, material.calibration, **given)
    found.chosen[AUTO] = table.algorithm
    for name, label in zip(ALGORITHMS, FIXED, strict=True):
        if not add(label, calibration=table.using(name)):
            return found
    if material.validate is not None:
        table = fastres.quantize(
            material.graph,
            material.calibration,
            validate=material.validate,
            max_drop=MAX_DROP,
            backend=backend,
            **given,
        )
        found.chosen[KEPT], found.kept = table.algorithm, table.keep
        ended = {(p.algorithm, p.kept): p.accuracy for p in table.curve}
        found.curve = ended[("", ())], ended[(table.algorithm, table.keep)]
        add(KEPT, calibration=table)
    return found


def answers(found: Engines, batches: Batches) -> dict[str, np.ndarray]:
    """The class that each engine gives each picture: int64 [N], by engine.

    "auto" is one of the five once more, under a name of its own.

    Args:
        batches: of one size, but that the last may be smaller.
    """
    classes: dict[str, list[np.ndarray]] = {name: [] for name in found.named}
    size = 0
    for batch in batches:
        size = size or len(batch)
        for name, engine in found.named.items():
            classes[name].append(top1(engine, batch, size))
    whole = {name: np.concatenate(parts) for name, parts in classes.items()}
    if AUTO in found.chosen and FIXED[0] in whole:
        whole[AUTO] = whole[f"int8 {found.chosen[AUTO]}"]
        if KEPT in whole:
            whole[KEPT] = whole.pop(KEPT)  # last
    return whole


def top1(engine: Engine, batch: Tensor, size: int) -> np.ndarray:
    """The class of the largest logit: int64 [N].

    Args:
        size: to which the batch is filled up, so that the engine is made for one shape only.
    """
    filled = torch.cat([batch, batch[:1].expand(size - len(batch), -1, -1, -1)])
    logits: Tensor = engine(filled.to(engine.device))
    found: np.ndarray = logits[: len(batch)].argmax(1).cpu().numpy()
    return found


def accuracy(engine: Engine, batches: Batches, labels: np.ndarray) -> float:
    """Share of right answers; `batches` as for `answers`."""
    found = answers(Engines({BASELINE: engine}), batches)[BASELINE]
    return float((found == labels).mean())


def normalised(pictures: np.ndarray, preprocess: fastres.Preprocess) -> Tensor:
    """[N, H, W, 3] uint8 -> [N, 3, H, W] fp32, neither resized nor cropped."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocess.mean, preprocess.std))
    planes = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
    return ((planes * preprocess.scale - mean) / std).contiguous()


def remarks(found: Engines) -> list[str]:
    """What was chosen by the calibration and validation pictures."""
    lines = []
    if AUTO in found.chosen:
        lines.append(f"{AUTO} took {found.chosen[AUTO]}")
    if found.curve is not None:
        before, after = found.curve
        lines.append(
            f"{KEPT} took {found.chosen[KEPT]} and kept in {BASELINE}: "
            f"{', '.join(found.kept) or 'no layer'} (validation {before:.2%} -> {after:.2%})"
        )
    return lines


def refusals(found: Mapping[str, str], backend: str) -> list[str]:
    """One line for each engine that could not be made."""
    return [f"{backend}: no {name}: {why}" for name, why in found.items()]


def _reason(error: Exception) -> str:
    """The first reason that a message lists, without its heading."""
    lines = str(error).splitlines()
    return lines[1] if len(lines) > 1 and lines[0].startswith("no backend") else lines[0]
