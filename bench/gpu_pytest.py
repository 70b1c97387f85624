"""The sections of gpu.py that run pytest: the tests marked gpu, and the kernel benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_sections import Row, Run

_BENCH = Path(__file__).parent
_SPARE = 10.0  # seconds for the last benchmark to end and the results to be written
_TOLD = 30  # lines of what pytest printed


def tests(run: Run) -> Iterator[Row]:
    """The tests marked gpu."""
    yield _pytest(run, ["-m", "gpu", "tests/kernels", "tests/backends/triton"])


def kernels(run: Run) -> Iterator[Row]:
    """Every kernel family on ResNet's layers: as many as there is time for, the rest is missing."""
    if run.device.type != "cuda":
        yield {"name": "not run", "reason": "kernel benchmarks need an NVIDIA GPU"}
        return
    report = run.out / "kernels.json"
    seconds = max(5.0, run.until - time.time() - _SPARE)
    flags = ["--benchmark-enable", f"--benchmark-json={report}", "--benchmark-columns=median"]
    flags += [f"--tiles-in={run.out}", f"--session-timeout={seconds:.0f}"]
    row = _pytest(run, [str(_BENCH / "test_kernels.py"), *flags])
    found = json.loads(report.read_text())["benchmarks"] if report.exists() else []
    right = [info for one in found if "family" in (info := one["extra_info"])]
    if out_of_time := any("session-timeout" in line for line in row["tail"]):
        failed = any(" failed" in line for line in row["tail"][-1:])
        row["right"] = not failed
    yield {**row, "out_of_time": out_of_time, "kernels": len(right), "table": summary(right)}


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
    left = max(30.0, run.until - time.time())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left)
        tail = done.stdout.strip().splitlines()[-_TOLD:]
        return {"name": "pytest", "right": done.returncode == 0, "tail": tail}
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode() if isinstance(error.stdout, bytes) else str(error.stdout)
        return {
            "name": "pytest",
            "error": "out of time",
            "tail": text.strip().splitlines()[-_TOLD:],
        }
