"""The sections of `make gpu` that users will quote: all peers, images per joule, and the report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

import fastres
from bench.children import environment
from bench.gpu.run import Row, Run, settled
from bench.pictures import photographs
from fastres.options import Precision

PRECISIONS: tuple[Precision, ...] = ("fp16", "int8")
PEERS = (
    "eager_channels_last",
    "torch_compile_reduce_overhead",
    "torch_compile_max_autotune",
    "torch_tensorrt",
    "tensorrt",
)
WARM_S, HEATED_S = 1.0, 3.0  # until power is steady, and while it is read
SPARE_S = 20  # for a run of fastres bench to write its results after an interrupt
LEAST_S = 60  # a run of fastres bench that has less than that measures nothing


def peers(run: Run) -> Iterator[Row]:
    """`fastres bench` with every peer: what it measured when its time was up is kept, too.

    Such a run is none that is done: another makes it anew, after those that have nothing yet.
    """
    for version in sorted(("v1.5", "v1"), key=lambda version: _results(run, version).exists()):
        name = f"resnet50 {version}, all peers"
        if (yield {"name": name, "asked": True}):
            continue
        left = run.until - time.time() - SPARE_S
        if left < LEAST_S:
            yield {"name": name, "error": f"not started: {left:.0f} s left, {LEAST_S} s needed"}
            continue
        yield {"name": name, **_against_peers(run, version, left)}


def _results(run: Run, version: str) -> Path:
    return run.out / f"bench-{version}.json"


def _against_peers(run: Run, version: str, seconds: float) -> Row:
    """One run of `fastres bench`; its results, unless an earlier one that was cut off had more."""
    path, fresh = _results(run, version), run.out / f"new-bench-{version}.json"
    fresh.unlink(missing_ok=True)
    flags = {
        "--precision": ",".join(PRECISIONS),
        "--batch-size": ",".join(map(str, run.batch_sizes)),
        "--image-size": str(run.image_size),
        "--device": run.device.type,
        "--backend": "triton",
        "--cache-dir": str(run.out),
        "--peers": ",".join(PEERS) if version == "v1.5" else "eager_channels_last",
        "--duration": "1",
        "-o": str(fresh),
    }
    words = [word for pair in flags.items() for word in pair]
    command = [sys.executable, "-m", "fastres", "bench", f"fastres:resnet50@{version}", *words]
    try:
        ended = interrupted(command, seconds)
    finally:  # also where this process is interrupted itself
        if _worth(fresh) >= max(_worth(path), (False, 0)):
            fresh.replace(path)
    row: Row = {"status": ended.status, "said": ended.said[-2000:]}
    if path.exists():
        row["left_out"] = json.loads(path.read_text())["left_out"]
        row["file"] = path.name
    if ended.status == 0:
        return row
    if ended.cut_off or ended.status == 130:
        return row | {"error": "out of time" if ended.cut_off else "interrupted"}
    return row | {"right": False}


def _worth(path: Path) -> tuple[bool, int]:
    """Whether a run came to its end, and how much it measured; -1 without results."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False, -1
    return found["run"]["finished"], len(found["measurements"])


@dataclass(frozen=True)
class Ended:
    """How a command ended, what it said, and whether its time was up before."""

    status: int
    said: str
    cut_off: bool


def interrupted(
    command: list[str], seconds: float, stderr: int | None = subprocess.STDOUT
) -> Ended:
    """Runs a command in a process group of its own and interrupts that when its time is up.

    It has `SPARE_S` to write what it has; what it started, and has not ended itself, ends with it.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        process_group=0,
        env=environment(),
    )
    cut_off = False
    try:
        try:
            said, _ = process.communicate(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            cut_off, said = True, _said_to_the_end(process)
        except KeyboardInterrupt:  # the group of its own is not sent what a terminal sends
            _said_to_the_end(process)
            raise
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()
    return Ended(process.returncode, said, cut_off)


def _said_to_the_end(process: subprocess.Popen[str]) -> str:
    _signal(process, signal.SIGINT)
    try:
        return process.communicate(timeout=SPARE_S)[0]
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGKILL)
        return process.communicate()[0]


def _signal(process: subprocess.Popen[str], number: int) -> None:
    """To whoever is left of its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def power(run: Run) -> Iterator[Row]:
    """Images per second, watts and images per joule of the tuned network, under steady load."""
    if shutil.which("nvidia-smi") is None:
        yield {"name": "not run", "reason": "there is no nvidia-smi to read the power draw with"}
        return
    model = settled(run.tuned, "v1.5", run)
    for batch in run.batch_sizes:
        x = photographs(batch, run.image_size)
        for precision in PRECISIONS:
            name = f"{precision} batch {batch}"
            if (yield {"name": name, "asked": True}):
                continue
            more = {"calibration": [x[:8]]} if precision == "int8" else {}
            with fastres.compile(
                model,
                x,
                backend="triton",
                precision=precision,
                device=run.device,
                cache_dir=str(run.out),
                **more,
            ) as engine:
                images, watts = _under_load(engine, x.to(run.device))
            row: Row = {"name": name, "images_per_second": images, "watts": watts}
            yield row | {"images_per_joule": images / watts if watts else None}


def _under_load(engine: fastres.Engine, x: torch.Tensor) -> tuple[float, float | None]:
    """Images per second, and the median of the watts read meanwhile."""
    _run(engine, x, WARM_S)
    with watts_read() as readings:
        calls, seconds = _run(engine, x, HEATED_S)
    watts = statistics.median(readings) if readings else None
    return calls * len(x) / seconds, watts


def _run(engine: fastres.Engine, x: torch.Tensor, seconds: float) -> tuple[int, float]:
    """Calls back to back for so long; how many there were, and how long they really took."""
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(10):
            engine(x)
        calls += 10
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
    return calls, time.perf_counter() - start


@contextmanager
def watts_read(interval_ms: int = 50) -> Iterator[list[float]]:
    """A list that fills with the power draw of the first GPU while the block runs."""
    command = ["nvidia-smi", "--id=0", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    process = subprocess.Popen(
        [*command, f"--loop-ms={interval_ms}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    told, readings = process.stdout, list[float]()
    assert told is not None

    def read() -> None:
        for line in told:
            try:
                readings.append(float(line))
            except ValueError:  # "[N/A]" where the card does not tell
                continue

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield readings
    finally:
        process.terminate()
        process.wait()
        reader.join()
        told.close()


def report(run: Run) -> Iterator[Row]:
    """One page from what `fastres bench` left in this folder."""
    found = sorted(Path(run.out).glob("bench-*.json"))
    if not found:
        yield {"name": "not made", "reason": "there are no results of fastres bench"}
        return
    page = run.out / "report.html"
    command = [sys.executable, "-m", "fastres", "report", *map(str, found), "-o", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    row: Row = {"name": "report", "status": done.returncode, "said": done.stderr[-500:]}
    yield row | ({"error": "no page was made"} if done.returncode else {})
