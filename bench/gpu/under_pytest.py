"""The sections that run pytest: the tests marked gpu, and the kernel benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.children import ROOT
from bench.gpu.quoted import interrupted
from bench.gpu.run import Row, Run

_BENCHMARKS = ROOT / "bench" / "kernels" / "test_speed.py"
_SPARE = 10.0  # seconds for the last benchmark to end and the results to be written
_KEPT = 30  # lines of what pytest printed
_NOTHING_LEFT = 5  # pytest's status where every test was deselected


def tests(run: Run) -> Iterator[Row]:
    """The tests marked gpu: one of each kernel family, then all, on every core."""
    for name, which in (("first", "gpu and first"), ("pytest", "gpu")):
        if not (yield {"name": name, "asked": True}):
            flags = ["-m", which, *_in_parallel(), "tests/kernels", "tests/backends/triton"]
            yield _pytest(run, flags) | {"name": name}


def _in_parallel() -> list[str]:
    """As many workers as cores; kernels that are compiled already leave the GPU's time alone."""
    if find_spec("xdist") is None:
        return []
    return ["-n", str(max(1, len(os.sched_getaffinity(0)) - 2)), "--dist", "load"]


def kernels(run: Run) -> Iterator[Row]:
    """Every kernel family on ResNet's layers: as many as there is time for, the rest next time."""
    if run.device.type != "cuda":
        yield {"name": "not run", "reason": "kernel benchmarks need an NVIDIA GPU"}
        return
    if (yield {"name": "pytest", "asked": True}):
        return
    report, fresh = run.out / "kernels.json", run.out / "new-kernels.json"
    fresh.unlink(missing_ok=True)
    seconds = max(5.0, run.until - time.time() - _SPARE)
    flags = ["--benchmark-enable", f"--benchmark-json={fresh}", "--benchmark-columns=median"]
    flags += [f"--tiles-in={run.out}", f"--session-timeout={seconds:.0f}"]
    before = _right(report)
    flags += [f"--deselect={one['fullname']}" for one in before]
    try:
        row = _pytest(run, [str(_BENCHMARKS), *flags])
    finally:
        if new := _right(fresh):
            found = json.loads(fresh.read_text()) | {"benchmarks": [*before, *new]}
            report.write_text(json.dumps(found, indent=2) + "\n")
    right = [one["extra_info"] for one in _right(report)]
    if any("session-timeout" in line for line in row["tail"]):
        row |= {"right": not _told(row, "failed"), "error": "out of time"}
    elif row["status"] == _NOTHING_LEFT and before:
        row["right"] = True
    out_of_time = row.get("error") == "out of time"
    yield {**row, "out_of_time": out_of_time, "kernels": len(right), "table": summary(right)}


def _right(report: Path) -> list[dict[str, Any]]:
    """The benchmarks of a file that tell of their kernel, which the wrong ones never do."""
    try:
        found = json.loads(report.read_text())["benchmarks"]
    except (FileNotFoundError, json.JSONDecodeError):  # pytest was killed
        return []
    return [one for one in found if "family" in one["extra_info"]]


def summary(kernels: Sequence[dict[str, Any]]) -> str:
    """A line for each family, batch and precision: how near its kernels come to the roofline.

    Args:
        kernels: what is known of each, which the wrong ones never tell.
    """
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for info in kernels:
        groups.setdefault((info["family"], info["batch_size"], info["dtype"]), []).append(info)
    lines = []
    for (family, batch, dtype), infos in sorted(groups.items()):
        shares = sorted(info["share_of_roofline"] for info in infos)
        lines.append(
            f"{family} batch {batch} {dtype}: {len(infos)} kernels, "
            f"{sum(info['microseconds'] for info in infos):.1f} us in all, "
            f"{shares[0]:.0%} to {shares[-1]:.0%} of the roofline, "
            f"at most {max(info['tflops'] for info in infos):.0f} TFLOP/s "
            f"and {max(info['gbs'] for info in infos):.0f} GB/s"
        )
    return "\n" + "\n".join(lines)


def _pytest(run: Run, arguments: Sequence[str]) -> Row:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    left = max(30.0, run.until - time.time())
    ended = interrupted(command, left, stderr=subprocess.DEVNULL)
    tail = ended.said.strip().splitlines()[-_KEPT:]
    row: Row = {"name": "pytest", "status": ended.status, "tail": tail}
    if ended.cut_off and ended.status != 0:
        return row | {"error": "out of time"} | ({"right": False} if _told(row, "failed") else {})
    if ended.status == 0 and not _told(row, "passed"):
        return row | {"refused": "every test was skipped"}
    return row | {"right": ended.status == 0}


def _told(row: Row, what: str) -> bool:
    """Whether pytest's last line tells of tests that did so."""
    return any(f" {what}" in line for line in row["tail"][-1:])
