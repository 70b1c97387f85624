"""The sections of `make gpu` that users will quote: all peers, images per joule, and the report."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pictures import photographs

import fastres
from fastres.options import Precision

if TYPE_CHECKING:
    from gpu_sections import Run

Row = dict[str, Any]
PRECISIONS: tuple[Precision, ...] = ("fp16", "int8")
PEERS = (
    "eager_channels_last",
    "torch_compile_reduce_overhead",
    "torch_compile_max_autotune",
    "torch_tensorrt",
    "tensorrt",
)
WARM_S, HEATED_S = 1.0, 3.0  # until power is steady, and while it is read
SPARE_S = 20  # for a run of fastres bench to end after an interrupt


def peers(run: Run) -> Iterator[Row]:
    """`fastres bench` with every peer: what it measured when its time was up counts, too."""
    for version in ("v1.5", "v1"):
        name = f"resnet50 {version}, all peers"
        if (yield {"name": name, "asked": True}):
            continue
        path = run.out / f"bench-{version}.json"
        flags = {
            "--precision": ",".join(PRECISIONS),
            "--batch-size": ",".join(map(str, run.batch_sizes)),
            "--image-size": str(run.image_size),
            "--device": run.device.type,
            "--backend": "triton",
            "--cache-dir": str(run.out),
            "--peers": ",".join(PEERS) if version == "v1.5" else "eager_channels_last",
            "--duration": "1",
            "-o": str(path),
        }
        words = [word for pair in flags.items() for word in pair]
        command = [sys.executable, "-m", "fastres", "bench", f"fastres:resnet50@{version}", *words]
        status, said = interrupted(command, run.until - time.time() - SPARE_S)
        row: Row = {"name": name, "status": status, "said": said[-2000:]}
        if path.exists():
            row["left_out"] = json.loads(path.read_text())["left_out"]
            row["file"] = path.name
        yield row | ({} if status in (0, 130) else {"right": False})


def interrupted(command: list[str], seconds: float) -> tuple[int, str]:
    """Runs a command, interrupts it when its time is up, and returns its status and words."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            said, _ = process.communicate(timeout=SPARE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
    return process.returncode, said


def power(run: Run) -> Iterator[Row]:
    """Images per second, watts and images per joule of ResNet-50, under steady load."""
    if shutil.which("nvidia-smi") is None:
        yield {"name": "not run", "reason": "there is no nvidia-smi to read the power draw with"}
        return
    from gpu_sections import settled

    model = settled("resnet50" if "resnet50" in run.nets else run.nets[0], "v1.5", run)
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
    readings: list[float] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
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


def report(run: Run) -> Iterator[Row]:
    """One page from what `fastres bench` left in this folder."""
    found = sorted(Path(run.out).glob("bench-*.json"))
    if not found:
        yield {"name": "not made", "reason": "there are no results of fastres bench"}
        return
    page = run.out / "report.html"
    command = [sys.executable, "-m", "fastres", "report", *map(str, found), "-o", str(page)]
    done = subprocess.run(command, capture_output=True, text=True)
    yield {"name": "report", "status": done.returncode, "said": done.stderr[-500:]}
