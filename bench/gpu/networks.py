"""The section `networks`: ResNet-50 v1.5 as it is deployed, verified, then timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch

import fastres
from bench.gpu.answers import answer
from bench.gpu.run import Row, Run, settled
from bench.pictures import photographs
from fastres.backends.triton.planning.eight_bits import FLOAT_OF
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.running.run import PlanRunner
from fastres.backends.triton.running.timing import recorder
from fastres.backends.triton.tuning.choosing import tiles_for
from fastres.options import Options, Precision
from fastres.timing.checks import judge, reference

VERIFIED = 4  # images of a batch
CALLS = 20  # timed, after some to warm up
NETWORKS: tuple[tuple[Precision, str], ...] = (
    ("fp16", "large"),
    ("fp16", "one"),
    ("int8", "large"),
)


def networks(run: Run) -> Iterator[Row]:
    """fp16 at the largest batch and at 1, int8 at the largest: right, then how fast."""
    sizes = {"large": max(run.batch_sizes), "one": 1}
    for precision, which in dict.fromkeys(NETWORKS):
        batch = sizes[which]
        name = f"{run.nets[0]} v1.5 {precision} batch {batch}"
        if not (yield {"name": name, "asked": True}):
            yield from answer(name, run.device, partial(_asked, run, precision, batch))


def _asked(run: Run, precision: Precision, batch: int) -> Row:
    """One network: its verdict on some of the batch, milliseconds of a call, and of each step."""
    model = settled(run.nets[0], "v1.5", run)
    pictures = photographs(batch, run.image_size)
    started = time.perf_counter()
    more: dict[str, Any] = {"calibration": [pictures[:8]]} if precision == "int8" else {}
    with fastres.compile(
        model.half(),
        pictures.half(),
        backend="triton",
        precision=precision,
        device=run.device,
        cache_dir=str(run.out),
        **more,
    ) as engine:
        row: Row = {"compile_s": time.perf_counter() - started}
        x = pictures.half().to(run.device)
        some = pictures[:VERIFIED]
        quantised = engine.graph if precision == "int8" else None
        expected = reference(model.float(), some, precision, quantised)
        found = engine(x)[:VERIFIED].cpu()
        verdict = judge(found, expected, "fastres", precision, batch)
        row |= {"right": not verdict.wrong, "rms": verdict.rms, "allowed": verdict.allowed_rms}
        if verdict.wrong:
            return row | {"why": verdict.wrong}
        row["call_ms"] = _milliseconds(lambda: engine(x), run.device)
        row["replay_ms"] = _replay_milliseconds(engine, x, precision, run)
        row["images_per_s"] = 1e3 * batch / row["call_ms"]
        profile = engine.profile(x)
        return row | {"steps": [[r.name, r.milliseconds] for r in profile.rows]}


def _replay_milliseconds(
    engine: fastres.Engine, x: torch.Tensor, precision: Precision, run: Run
) -> float:
    """All launches of the plan as they are recorded, without the copies of input and output."""
    shapes = (tuple(x.shape),)
    tiles = tiles_for(Options(cache_dir=str(run.out)), run.device)
    plan = make_plan(engine.graph, shapes, precision, tiles)
    constants = Packed(engine.graph, FLOAT_OF[precision], run.device)
    record = recorder(run.device) if run.device.type == "cuda" else None
    runner = PlanRunner(plan, constants, run.device, record)
    runner.run([x])
    with runner.context() as context:
        assert context.replay is not None  # it has run
        return _milliseconds(context.replay, run.device)


def _milliseconds(call: Any, device: torch.device) -> float:
    """The median of whole calls, each waited for."""
    times = []
    for _ in range(CALLS + 3 if device.type == "cuda" else 1):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return median(times[3:] or times)
