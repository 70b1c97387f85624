"""The machine that a figure belongs to: processor, GPU, versions, and the state it was in."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "fastres",
    "openvino",
    "onnxruntime",
    "triton",
    "tensorrt",
    "tensorrt-rtx",
    "torch-tensorrt",
    "nncf",
)
_CPU = Path("/sys/devices/system/cpu")
_GPU_STATE = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,driver_version"


@dataclass(frozen=True)
class Machine:
    """Where it was measured. `threads` are torch's; `versions` lists what is installed.

    Args:
        state: what may differ from hour to hour: clocks, governor, load, a GPU's power.
    """

    cpu: str
    cores: int
    threads: int
    gpu: str | None
    versions: dict[str, str]
    state: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        gpu = f", {self.gpu}" if self.gpu else ""
        return f"{self.cpu}, {self.cores} cores, {self.threads} threads{gpu}; {versions}"


def machine(gpu: torch.device | None = None) -> Machine:
    """The facts about this machine and installation that a figure depends on.

    Args:
        gpu: of several, the one that is meant; None: the current one.
    """
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(gpu) if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0))
    return Machine(_cpu_model(), cores, torch.get_num_threads(), name, versions, state(gpu))


def state(gpu: torch.device | None = None) -> dict[str, str]:
    """Clocks, governor, load and, where `nvidia-smi` tells, the GPU's clocks and power."""
    found = {"load": " ".join(f"{load:.2f}" for load in os.getloadavg())}
    governor = _CPU / "cpu0/cpufreq/scaling_governor"
    if governor.exists():
        found["governor"] = governor.read_text().strip()
    clocks = _cpuinfo("cpu MHz", [])
    if clocks:
        found["cpu MHz"] = ", ".join(clocks[:8])
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        query = [smi, *_which(gpu), f"--query-gpu={_GPU_STATE}", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, timeout=30)
        if told.returncode == 0:
            values = told.stdout.strip().splitlines()[0].split(", ")
            found |= {f"gpu {k}": v for k, v in zip(_GPU_STATE.split(","), values, strict=False)}
    return found


def _which(gpu: torch.device | None) -> list[str]:
    """CUDA's numbers need not be those of nvidia-smi, which also sees GPUs that are hidden here."""
    if not torch.cuda.is_available():
        return []
    return ["-i", f"GPU-{torch.cuda.get_device_properties(gpu).uuid}"]


def commit() -> str | None:
    """The commit of the checkout that this package runs from; None for an installed package."""
    folder = Path(__file__).resolve().parents[2]
    git = shutil.which("git")
    if git is None or not (folder / ".git").exists():
        return None
    told = [
        subprocess.run([git, "-C", str(folder), *asked], capture_output=True, text=True)
        for asked in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "-uno"))
    ]
    if any(answer.returncode for answer in told):
        return None
    name, changed = (answer.stdout.strip() for answer in told)
    return f"{name} with changes" if changed else name


def record(argv: Sequence[str], started: float) -> dict[str, Any]:
    """What a document says of the run it comes from: command, commit, date, seconds until now.

    Args:
        argv: what to type to run it again.
        started: seconds since the epoch.
    """
    return {
        "argv": list(argv),
        "commit": commit(),
        "date": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 1),
    }


def cores(count: int) -> list[int]:
    """So many of the logical processors this process may use, of different cores if possible."""
    allowed = sorted(os.sched_getaffinity(0))
    firsts: dict[tuple[str, str], int] = {}
    for cpu in allowed:
        firsts.setdefault(_core_of(cpu), cpu)
    return sorted(_first(count, [*firsts.values(), *allowed]))


def _first(count: int, cpus: Sequence[int]) -> list[int]:
    return list(dict.fromkeys(cpus))[:count]


def _core_of(cpu: int) -> tuple[str, str]:
    """Its package and core; a core of its own where the system does not tell."""
    topology = _CPU / f"cpu{cpu}/topology"
    try:
        package = (topology / "physical_package_id").read_text().strip()
        return package, (topology / "core_id").read_text().strip()
    except OSError:
        return "", str(cpu)


def _cpu_model() -> str:
    return _cpuinfo("model name", [platform.processor() or platform.machine()])[0]


def _cpuinfo(key: str, otherwise: list[str]) -> list[str]:
    """What /proc/cpuinfo says of each processor, which it words differently on Arm."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)] or otherwise
