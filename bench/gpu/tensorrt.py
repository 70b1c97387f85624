"""The section of `make gpu` on TensorRT: right first, then beside Triton and PyTorch.

It says why where there is no TensorRT for this GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

import fastres
from bench.gpu.run import PARITY_BATCH, Run, settled
from bench.pictures import photographs
from fastres.backends.select import BACKENDS
from fastres.graph.copies import copied
from fastres.options import Precision
from fastres.timing.benchmark import Target, benchmark

NETS = ("resnet18", "resnet50", "resnet101")
PRECISIONS: tuple[Precision, ...] = ("fp16", "int8")


def tensorrt(run: Run) -> Iterator[dict[str, Any]]:
    """Parity, what the builder made of each network, and speed."""
    why_not = BACKENDS["tensorrt"]().unavailable()
    if why_not is not None:
        yield {"name": "not run", "reason": why_not}
        return
    yield from _parity(run)
    yield from _speed(run)


def _parity(run: Run) -> Iterator[dict[str, Any]]:
    x = photographs(PARITY_BATCH, run.image_size)
    for net in NETS:
        model = settled(net, "v1.5", run)
        for precision in PRECISIONS:
            name = f"{net} {precision}"
            if (yield {"name": name, "asked": True}):
                continue
            started = time.time()
            with _engine(model, x, precision, "tensorrt", run, verify=False) as engine:
                seconds = time.time() - started
                report = fastres.verify(model, engine, [x])
                notes = engine.info.account.notes
            yield {
                "name": name,
                "right": report.passed,
                "report": str(report),
                "build_seconds": seconds,
                "notes": notes,
            }


def _speed(run: Run) -> Iterator[dict[str, Any]]:
    for batch in run.batch_sizes:
        x = photographs(batch, run.image_size).half().to(run.device)
        x = x.contiguous(memory_format=torch.channels_last)
        model = settled("resnet50", "v1.5", run).half()
        name = f"resnet50 batch {batch}"
        if (yield {"name": name, "asked": True}):
            continue
        engines = {
            f"{backend} {precision}": _engine(model, x, precision, backend, run, verify=False)
            for backend in ("tensorrt", "triton")
            for precision in PRECISIONS
        }
        theirs = model.to(run.device).to(memory_format=torch.channels_last)
        targets = [Target(name, engine) for name, engine in engines.items()]
        targets.append(Target("eager channels_last", theirs))
        compiled = torch.compile(copied(theirs), mode="reduce-overhead", dynamic=False)
        targets.append(Target("torch.compile reduce-overhead", compiled))
        report = benchmark(targets, [x], duration_s=1.0, baseline="eager channels_last")
        yield {"name": name, "table": str(report), **report.to_dict()}
        for engine in engines.values():
            engine.close()


def _engine(
    model: torch.nn.Module,
    x: torch.Tensor,
    precision: Precision,
    backend: str,
    run: Run,
    **more: Any,
) -> fastres.Engine:
    calibration = [x[:8].cpu()] if precision == "int8" else None
    return fastres.compile(
        model,
        x.cpu(),
        backend=backend,
        precision=precision,
        device=run.device,
        calibration=calibration,
        cache_dir=str(run.out),
        **more,
    )
