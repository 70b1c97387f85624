"""Several callables timed against each other in one run: `fastres.benchmark`.

A machine's speed drifts, by other load and by heat, often by more than what is to be measured.
So the targets take turns: each round gives every target one turn, in an order drawn anew, and a
ratio is formed within a round. Quoted are the median of those ratios and its interval.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastres.bench_report import BenchReport, Measurement, Ratio, machine
from fastres.engine import Engine
from fastres.errors import InputError
from fastres.options import integer, is_number

TURNS = 20  # into which the time of one target is cut
MIN_ROUNDS = 8  # however slow the targets are: fewer pairs say nothing

Call = Callable[[Tensor], Any]
Progress = Callable[[float], None]
Rounds = list[list[float]]  # seconds of each call, by round


@dataclass(frozen=True)
class Target:
    """Something to be timed: called with one batch. `precision` is only shown."""

    name: str
    call: Call
    precision: str = ""


def benchmark(
    targets: Mapping[str, Call] | Sequence[Target],
    examples: Mapping[int, Tensor] | Sequence[Tensor],
    *,
    duration_s: float = 3.0,
    percentiles: Sequence[float] = (50, 90, 95, 99),
    baseline: str | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> BenchReport:
    """Times several targets, interleaved, at one or more batch sizes.

    Every target is first called for a sixth of `duration_s`, untimed. Then come rounds until each
    target has been timed for about `duration_s`, and at least 8. A turn within a round starts with
    one untimed call, which lets the threads of the target before come to rest. Calls are made
    without gradients; on CUDA the device is synchronised around each.

    Args:
        targets: callables by name, or `Target`s; an Engine's precision is read off the engine.
        examples: batches [N, ...], by batch size or as a sequence; all targets get the same ones.
        duration_s: timed seconds for each target and batch size.
        percentiles: of the latency of single calls.
        baseline: the target that ratios refer to; None takes the first.
        progress: called with the fraction done.
        seed: of the order within rounds and of the bootstrap.

    Raises:
        InputError: no target, two of one name, one that cannot be called, an unknown baseline, an
            empty batch, or a number out of range.
    """
    named, batches = _as_targets(targets), _as_batches(examples)
    reference = named[0].name if baseline is None else baseline
    if reference not in [target.name for target in named]:
        raise InputError(
            f"baseline is {baseline!r}; the targets are {', '.join(t.name for t in named)}"
        )
    if not (is_number(duration_s) and duration_s > 0):
        raise InputError(f"duration_s is {duration_s!r}; it must be a number above 0")
    wanted = list(percentiles) if isinstance(percentiles, Iterable) else []
    if not wanted or not all(is_number(p) and 0 < p <= 100 for p in wanted):
        raise InputError(f"percentiles are {percentiles!r}; give some above 0 and up to 100")
    if progress is not None and not callable(progress):
        raise InputError(f"progress is {progress!r}; give something to call, or None")
    seed = integer("seed", seed, least=0, most=2**63 - 1)

    shuffler = random.Random(seed)
    measurements: list[Measurement] = []
    for i, (size, batch) in enumerate(batches.items()):

        def report(done: float, i: int = i) -> None:
            if progress is not None:
                progress((i + done) / len(batches))

        with torch.no_grad():
            timed = _interleave(named, batch, duration_s, shuffler, report)
        measurements += [_summary(t, size, timed[t.name], wanted) for t in named]
    return BenchReport(machine(), reference, seed, tuple(measurements)).against(reference)


def _as_targets(targets: Mapping[str, Call] | Sequence[Target]) -> list[Target]:
    if isinstance(targets, Mapping):
        named = [Target(name, call) for name, call in targets.items()]
    else:
        named = list(targets) if isinstance(targets, Iterable) else [targets]
    for t in named:
        if not (isinstance(t, Target) and isinstance(t.name, str) and callable(t.call)):
            raise InputError(
                f"{t!r} is no target; give callables by name, {{'ours': engine}}, or a list of "
                "fastres.benchmarking.Target"
            )
    twice = [name for name, count in Counter(t.name for t in named).items() if count > 1]
    if not named or twice:
        raise InputError(f"two targets are called {twice[0]!r}" if twice else "no target to time")
    return [
        replace(t, precision=_precision_run(t.call))
        if isinstance(t.call, Engine) and not t.precision
        else t
        for t in named
    ]


def _precision_run(engine: Engine) -> str:
    return ", ".join(engine.info.precisions)


def _as_batches(examples: Mapping[int, Tensor] | Sequence[Tensor]) -> dict[int, Tensor]:
    given: object = examples  # a tensor iterates, too
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        kind = type(given).__name__
        raise InputError(f"examples is {kind}; give a sequence of batches, [x], or {{size: x}}")
    batches = list(examples.values() if isinstance(examples, Mapping) else examples)
    for batch in batches:
        if not (isinstance(batch, Tensor) and batch.dim()):
            raise InputError(f"examples holds {batch!r}; a batch is a tensor [N, ...]")
    sizes = list(examples) if isinstance(examples, Mapping) else [len(batch) for batch in batches]
    pairs = list(zip(sizes, batches, strict=True))
    for size, batch in pairs:
        if size != len(batch) or size < 1:
            raise InputError(
                f"the batch for size {size} is {list(batch.shape)}; N must agree and be 1 or more"
            )
    if not pairs or len(dict(pairs)) != len(pairs):
        raise InputError(f"batch sizes are {[size for size, _ in pairs]}; give each one once")
    return dict(pairs)


def _interleave(
    targets: Sequence[Target],
    batch: Tensor,
    duration_s: float,
    shuffler: random.Random,
    progress: Progress,
) -> dict[str, Rounds]:
    """Seconds of every timed call, by target and round."""
    fastest = {t.name: _warm_up(t.call, batch, duration_s / 6) for t in targets}
    timed: dict[str, Rounds] = {t.name: [] for t in targets}
    spent, budget, rounds = 0.0, duration_s * len(targets), 0
    while rounds < MIN_ROUNDS or spent < budget:
        for target in shuffler.sample(targets, len(targets)):
            calls = max(1, round(duration_s / TURNS / fastest[target.name]))
            seconds = _turn(target.call, batch, calls)
            timed[target.name].append(seconds)
            fastest[target.name] = min(fastest[target.name], *seconds)
            spent += sum(seconds)
        rounds += 1
        progress(min(1.0, spent / budget, rounds / MIN_ROUNDS))
    return timed


def _warm_up(call: Call, batch: Tensor, seconds: float) -> float:
    """Calls until the time is over, at least twice, and returns the fastest call's time."""
    call(batch)  # may compile for this shape: not part of the time
    end, fastest = time.perf_counter() + seconds, float("inf")
    while fastest == float("inf") or time.perf_counter() < end:
        fastest = min(fastest, _timed(call, batch))
    return fastest


def _turn(call: Call, batch: Tensor, calls: int) -> list[float]:
    call(batch)
    return [_timed(call, batch) for _ in range(calls)]


def _timed(call: Call, batch: Tensor) -> float:
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    start = time.perf_counter()
    call(batch)
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    return time.perf_counter() - start


def _summary(
    target: Target, size: int, rounds: Rounds, percentiles: Sequence[float]
) -> Measurement:
    milliseconds = 1e3 * np.concatenate([np.asarray(calls) for calls in rounds])
    latencies = np.percentile(milliseconds, list(percentiles))
    return Measurement(
        target.name,
        target.precision,
        size,
        float(1e3 * size * len(milliseconds) / milliseconds.sum()),
        {f"p{p:g}": float(ms) for p, ms in zip(percentiles, latencies, strict=True)},
        float(milliseconds.min()),
        len(milliseconds),
        tuple(float(1e3 * np.median(calls)) for calls in rounds),
        Ratio(1.0, 1.0, 1.0),
    )
