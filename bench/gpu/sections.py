"""The sections of a run: what a GPU is asked, one generator of rows for each."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastres
from bench.gpu.answers import answer
from bench.gpu.families import families, one_of_each
from bench.gpu.launches import Job, built_for, launches
from bench.gpu.networks import networks
from bench.gpu.questions import asking
from bench.gpu.quoted import peers, power, report
from bench.gpu.run import (
    FAST,
    PARITY_BATCH,
    TRIED,
    Row,
    Run,
    problems,
    settled,
    versions,
)
from bench.gpu.stem import stem
from bench.gpu.tensorrt import tensorrt
from bench.gpu.under_pytest import kernels, tests
from bench.kernels import cases as kernel_cases
from bench.kernels.cases import name_of
from bench.pictures import photographs
from fastres.backends.triton.planning.problems import Problem
from fastres.backends.triton.planning.table import (
    Table,
    Tiles,
    cache_path,
    read_table,
    this_machine,
    write_table,
)
from fastres.backends.triton.tuning.choosing import tiles_for
from fastres.backends.triton.tuning.tune import precompile, tune
from fastres.graph.copies import copied
from fastres.kernels.aot import compile_kernel, key_of
from fastres.options import Options, Precision
from fastres.timing.benchmark import Target, benchmark
from fastres.timing.machine import machine

NETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50", "wide_resnet50")
PRECISIONS: tuple[Precision, ...] = ("fp16", "int8", "bf16", "tf32", "fp32")
BOTH_LAUNCHES = (1, 32)  # batches at which launches are compared, dependent and not
POWER = "name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"


def facts(run: Run) -> Iterator[Row]:
    """The machine: GPU, driver, clocks, versions."""
    found: Row = {"name": "machine", **vars(machine()), "argv": sys.argv[1:]}
    if run.device.type == "cuda":
        query = ["nvidia-smi", f"--query-gpu={POWER}", "--format=csv,noheader"]
        found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    yield found


def compiling(run: Run) -> Iterator[Row]:
    """Fills Triton's cache with what the next sections launch, on every core, the first first."""
    if run.device.type != "cuda":
        yield {"name": "not run", "reason": "Triton's interpreter compiles nothing"}
        return
    target = tiles_for(Options(), run.device).target
    jobs: list[Job] = [("kernel", name_of(case), target) for case in one_of_each()]
    jobs += [("plan", *net, batch, target, run.image_size) for net, batch in _plans(run)]
    jobs += [("question", case.name, target) for case in asking.cases(Tiles(target))]
    for batch in run.batch_sizes:
        for version in versions(run.tuned):
            jobs += [("tiles", p, target) for p in _problems(version, batch, run)]
    jobs += [("kernel", name_of(case), target) for case in kernel_cases.cases()]
    workers = max(1, len(os.sched_getaffinity(0)) - 2)
    context = multiprocessing.get_context("spawn")
    started, kernels, all_of_them = time.time(), 0, True
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending = [pool.submit(_compile, job) for job in dict.fromkeys(jobs)]
        for future in as_completed(pending):
            kernels += future.result()
            if time.time() > run.until - 5:
                all_of_them = all(future.done() for future in pending)
                pool.shutdown(cancel_futures=True)
                break
    row: Row = {"name": "compiled", "kernels": kernels, "seconds": time.time() - started}
    yield row | {"workers": workers} | ({} if all_of_them else {"error": "out of time"})


def _plans(run: Run) -> Iterator[tuple[tuple[str, str, Precision], int]]:
    for net in run.nets:
        for version in versions(net):
            for precision in run.precisions:
                yield (net, version, precision), PARITY_BATCH
    for version in versions(run.tuned):
        for batch in run.batch_sizes:
            for precision in FAST:
                yield (run.tuned, version, precision), batch


def _compile(job: Job) -> int:
    """In a process of its own, without touching the GPU."""
    if job[0] == "tiles":
        return precompile(*job[1:], tried=TRIED)
    sm, known = built_for(job).sm, set()
    with suppress(Exception):  # of Triton's, of many kinds; what is asked itself will say which
        for launch in launches(job):
            if (key := key_of(launch)) not in known:
                with suppress(Exception):
                    compile_kernel(launch, sm)
                    known.add(key)
    return len(known)


def parity(run: Run) -> Iterator[Row]:
    """Every network in every precision against PyTorch in float64."""
    x = photographs(PARITY_BATCH, run.image_size)
    for net in sorted(run.nets, key=lambda name: name != "resnet50"):
        for version in versions(net):
            made = cache(partial(settled, net, version, run))  # not where all is known
            for precision in run.precisions:
                name = f"{net} {version} {precision}"
                if (yield {"name": name, "asked": True}):
                    continue
                work = partial(_parity, made, x, precision, run)
                yield from answer(name, run.device, work, right=False)  # so are refusals here


def _parity(made: Callable[[], nn.Module], x: Tensor, precision: Precision, run: Run) -> Row:
    model = made()
    more = {"calibration": [x]} if precision == "int8" else {}
    with _engine(model, x, precision, run, **more) as engine:
        report = fastres.verify(model, engine, [x])
    return {"right": report.passed, "report": str(report)}


def tuning(run: Run) -> Iterator[Row]:
    """The fastest right tile of every problem of a network, and which form of it is fastest."""
    this = this_machine(run.device)
    path = cache_path(this, str(run.out))
    table = read_table(path, this)
    for batch in sorted(run.batch_sizes, reverse=True):
        for version in versions(run.tuned):
            for problem in _problems(version, batch, run):
                if problem.key in table.entries:
                    continue
                if (yield {"name": problem.key, "asked": True}):
                    continue
                yield from answer(
                    problem.key, run.device, partial(_tuned, problem, table, path, run)
                )


def _tuned(problem: Problem, table: Table, path: Path, run: Run) -> Row:
    attempts = tune([problem], table, run.device, keep=lambda t: write_table(path, t), tried=TRIED)
    tried = [
        {"tile": str(a.tile), "ms": a.milliseconds, "why": a.reason} for a in attempts[problem]
    ]
    row: Row = {"attempts": tried}
    best = table.entries.get(problem.key)
    if best is not None:
        row["us"] = best.microseconds
    if best is not None or any(a.wrong for a in attempts[problem]):
        return row | {"right": not any(a.wrong for a in attempts[problem])}
    return row | {"refused": tried[0]["why"] if tried else "no tile fits"}


def _problems(version: str, batch: int, run: Run) -> list[Problem]:
    tiles, asked = tiles_for(Options(), run.device), (run.precisions, run.image_size)
    return problems(version, batch, *asked, tiles.target, run.tuned, tiles.library)


def speed(run: Run) -> Iterator[Row]:
    """Ours in fp16 and int8 beside PyTorch's own ways in fp16, interleaved.

    First beside eager PyTorch, for every network and batch; torch.compile, which takes a minute
    each to build, comes after all of these, beside the two once more.
    """
    torch.backends.cudnn.benchmark = True
    networks = [(version, batch) for version in versions(run.tuned) for batch in run.batch_sizes]
    for compiled in (False, True):
        for version, batch in networks:
            modes = _modes(version, batch) if compiled else ()
            if compiled and not modes:
                continue
            name = f"{version} batch {batch}{', torch.compile' if compiled else ''}"
            if not (yield {"name": name, "asked": True}):
                yield from answer(name, run.device, partial(_raced, version, batch, modes, run))


def _raced(version: str, batch: int, modes: Sequence[str], run: Run) -> Row:
    x = photographs(batch, run.image_size).half().to(run.device)
    x = x.contiguous(memory_format=torch.channels_last)
    model = settled(run.tuned, version, run).half()
    launches = (None, True, False) if batch in BOTH_LAUNCHES and not modes else (None,)
    ours = {
        "fastres" if asked is None else f"fastres, dependent_launch={asked}": _engine(
            model, x, "fp16", run, cache_dir=str(run.out), dependent_launch=asked
        )
        for asked in launches
    }
    ours["fastres int8"] = _engine(
        model, x, "int8", run, cache_dir=str(run.out), calibration=[x[:8].cpu()]
    )
    theirs = model.to(run.device).to(memory_format=torch.channels_last)
    targets = [Target(name, engine) for name, engine in ours.items()]
    targets.append(Target("eager channels_last", theirs))
    for mode in modes:
        own = torch.compile(copied(theirs), mode=mode, dynamic=False)
        targets.append(Target(f"torch.compile {mode}", own))
    report = benchmark(targets, [x], duration_s=1.0, baseline="eager channels_last")
    for engine in ours.values():
        engine.close()
    return {"table": str(report), **report.to_dict()}


def _modes(version: str, batch: int) -> tuple[str, ...]:
    """Both of torch.compile's where they matter most; they take a minute each to compile."""
    if version != "v1.5":
        return ()
    return ("reduce-overhead", "max-autotune") if batch in (1, 256) else ("reduce-overhead",)


def profile(run: Run) -> Iterator[Row]:
    """Where the time of the tuned network goes, step by step."""
    for batch in run.batch_sizes:
        x = photographs(batch, run.image_size).half().to(run.device)
        model = settled(run.tuned, "v1.5", run).half()
        for precision in FAST:
            name = f"batch {batch} in {precision}"
            if not (yield {"name": name, "asked": True}):
                yield from answer(name, run.device, partial(_profiled, model, x, precision, run))


def _profiled(model: nn.Module, x: Tensor, precision: Precision, run: Run) -> Row:
    more = {"calibration": [x[:8].cpu()]} if precision == "int8" else {}
    with _engine(model, x, precision, run, cache_dir=str(run.out), **more) as engine:
        found = engine.profile(x)
    return {"table": str(found), **found.to_dict()}


def _engine(
    model: nn.Module, x: Tensor, precision: Precision, run: Run, **more: Any
) -> fastres.Engine:
    return fastres.compile(
        model, x.cpu(), backend="triton", precision=precision, device=run.device, **more
    )


SECTIONS: dict[str, Callable[[Run], Iterator[Row]]] = {
    "facts": facts,
    "compile": compiling,
    "families": families,
    "networks": networks,
    "parity": parity,
    "tests": tests,
    "stem": stem,
    "tuning": tuning,
    "questions": asking.questions,
    "kernels": kernels,
    "speed": speed,
    "peers": peers,
    "power": power,
    "profile": profile,
    "tensorrt": tensorrt,
    "report": report,
}
