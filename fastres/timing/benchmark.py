"""Several callables timed against each other in one run: `fastres.benchmark`.

A machine's speed drifts, by other load and by heat, often by more than what is to be measured.
So the targets take turns: each round gives every target one turn, in an order drawn anew, and a
ratio is formed within a round. Quoted are the median of those ratios and its interval.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastres.engine.engine import Engine
from fastres.errors import InputError
from fastres.options import integer, is_number
from fastres.timing.machine import machine
from fastres.timing.report import BenchReport, Measurement, measurement
from fastres.timing.turns import Call, Here, Progress, Rounds, interleave


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
    one untimed call, which lets the threads of the target before come to rest, unless a call takes
    a second or more. Calls are made without gradients; on CUDA the device is synchronised around
    each.

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

        timed: dict[str, Rounds] = {}
        here = [Here(target.name, target.call, batch) for target in named]
        with torch.no_grad():
            interleave(here, duration_s, shuffler, report, timed)
        measurements += [
            measurement(t.name, t.precision, size, [timed[t.name]], wanted) for t in named
        ]
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
                "fastres.timing.benchmark.Target"
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
