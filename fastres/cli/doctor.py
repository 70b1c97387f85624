"""fastres doctor: what is installed, which backends can run here, and what to type if not."""

from __future__ import annotations

import importlib
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import typer

from fastres.cli import flags
from fastres.cli.output import emit, working

# what the optional packages are for; the required ones are read off our own metadata
_OPTIONAL = {
    "onnxruntime": "a peer in fastres bench",
    "torchvision": "models named torchvision:NAME",
    "timm": "models named timm:NAME",
    "tensorrt": "the tensorrt backend",
    "tensorrt-rtx": "the tensorrt backend on RTX GPUs, and building for them without one",
}
_MODULES = {
    "pillow": "PIL",
    "tensorrt-rtx": "tensorrt_rtx",
}  # where the module's name is not the package's


@dataclass(frozen=True)
class Package:
    """One package: `problem` is None if it can be imported, `wanted` what pip understands."""

    name: str
    version: str | None
    wanted: str
    purpose: str
    problem: str | None

    @property
    def required(self) -> bool:
        return self.purpose == "required"


@dataclass(frozen=True)
class BackendState:
    """A backend, and why it cannot run here, if it cannot."""

    name: str
    problem: str | None


def doctor(as_json: flags.Json = False, output: flags.Output = None) -> None:
    """Show what is installed and which backends run here.

    For everything missing there is the line to type. Status 3 if something needed is missing.
    """
    with working("looking around"):
        packages = [_package(*entry) for entry in _wanted()]
        torch_works = all(p.problem is None for p in packages if p.name == "torch")
        backends = _backends() if torch_works else [BackendState("all", "torch does not work")]
        gpu = _gpu() if torch_works else {}
    broken = [p for p in packages if p.problem is not None]
    lines = [f"pip install {shlex.join(p.wanted for p in group)}" for group in _groups(broken)]
    fields: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": [asdict(package) for package in packages],
        "gpu": gpu,
        "backends": [asdict(backend) for backend in backends],
        "install": lines,
    }
    emit("doctor", _text(fields, packages, backends), fields, as_json=as_json, output=output)
    runs = any(backend.problem is None for backend in backends)
    if not runs or any(package.required for package in broken):
        raise typer.Exit(3)


def _wanted() -> list[tuple[str, str, str]]:
    """Name, requirement and purpose of each package, as fastres's own metadata has them."""
    try:
        declared = metadata.requires("fastres") or []
    except metadata.PackageNotFoundError:
        declared = []
    found: dict[str, tuple[str, str, str]] = {}
    for line in declared:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()
        if "sys_platform" in marker and sys.platform not in marker:
            continue
        if "extra" not in marker:
            found[name] = (name, requirement, "required")
        elif name in _OPTIONAL:
            found[name] = (name, requirement, _OPTIONAL[name])
    for name, purpose in _OPTIONAL.items():
        found.setdefault(name, (name, name, purpose))
    return list(found.values())


def _package(name: str, wanted: str, purpose: str) -> Package:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Package(name, None, wanted, purpose, "not installed")
    try:
        importlib.import_module(_MODULES.get(name, name))
    except Exception as error:  # a broken package may raise anything: that is what we look for
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return Package(name, version, wanted, purpose, f"cannot be imported: {first}")
    return Package(name, version, wanted, purpose, None)


def _backends() -> list[BackendState]:
    from fastres.backends.select import BACKENDS

    states = []
    for name in BACKENDS:
        try:
            problem = BACKENDS[name]().unavailable()
        except ImportError as error:
            problem = f"cannot be imported: {error}"
        states.append(BackendState(name, problem))
    return states


def _gpu() -> dict[str, Any]:
    import torch

    built = torch.version.cuda
    if not torch.cuda.is_available():
        why = "no usable NVIDIA driver or GPU" if built else "this PyTorch is built without CUDA"
        return {"cuda": built, "devices": [], "problem": why}
    devices = []
    for index in range(torch.cuda.device_count()):
        at = torch.cuda.get_device_properties(index)
        capability = f"sm_{at.major}{at.minor}"
        memory = round(at.total_memory / 2**30, 1)
        devices.append({"name": at.name, "capability": capability, "memory_gib": memory})
    return {"cuda": built, "devices": devices, "problem": None}


def _groups(broken: Sequence[Package]) -> list[list[Package]]:
    """What is needed in one line, what is optional in a line each."""
    needed = [p for p in broken if p.required]
    return ([needed] if needed else []) + [[p] for p in broken if not p.required]


def _text(
    fields: dict[str, Any], packages: Sequence[Package], backends: Sequence[BackendState]
) -> str:
    from rich.table import Table

    from fastres.text import render

    table = Table("package", "version", "state", "for")
    for p in packages:
        table.add_row(p.name, p.version or "-", p.problem or "ok", p.purpose)
    gpu = fields["gpu"]
    found = [
        f"{d['name']} ({d['capability']}, {d['memory_gib']} GiB)" for d in gpu.get("devices", [])
    ]
    lines = [
        f"python {fields['python']} on {fields['platform']}",
        render(table),
        f"CUDA in PyTorch: {gpu.get('cuda') or 'none'}",
        f"GPU: {', '.join(found) or gpu.get('problem', 'unknown')}",
        *(f"backend {b.name}: {b.problem or 'can run here'}" for b in backends),
        *(f"to install: {line}" for line in fields["install"]),
    ]
    return "\n".join(lines)
