"""What is installed, which backends can run here, and what to type for what is missing.

It imports nothing but Python's own until it looks: it has to answer where little else works.
"""

from __future__ import annotations

import importlib
import platform
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# what the optional packages are for; the required ones are read off our own metadata
_OPTIONAL = {
    "onnxruntime": "the onnxruntime backend, and a peer in fastres bench",
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


@dataclass(frozen=True)
class Found:
    """What there is on this machine.

    Args:
        gpu: CUDA's version in PyTorch and the devices; empty where torch does not work.
    """

    packages: tuple[Package, ...]
    backends: tuple[BackendState, ...]
    gpu: dict[str, Any]

    @property
    def install(self) -> list[str]:
        """Lines to type: what is needed in one, what is optional in one each."""
        broken = [p for p in self.packages if p.problem is not None]
        needed = [p for p in broken if p.required]
        groups = ([needed] if needed else []) + [[p] for p in broken if not p.required]
        return [f"pip install {shlex.join(p.wanted for p in group)}" for group in groups]

    @property
    def suffices(self) -> bool:
        """Whether all that is needed is there, and a backend runs."""
        runs = any(backend.problem is None for backend in self.backends)
        return runs and not any(p.required and p.problem is not None for p in self.packages)

    def text(self, table: str) -> str:
        """All of it in lines.

        Args:
            table: the packages.
        """
        devices = self.gpu.get("devices", [])
        gpus = [f"{d['name']} ({d['capability']}, {d['memory_gib']} GiB)" for d in devices]
        lines = [
            f"python {platform.python_version()} on {platform.platform()}",
            table,
            f"CUDA in PyTorch: {self.gpu.get('cuda') or 'none'}",
            f"GPU: {', '.join(gpus) or self.gpu.get('problem', 'unknown')}",
            *(f"backend {b.name}: {b.problem or 'can run here'}" for b in self.backends),
            *(f"to install: {line}" for line in self.install),
        ]
        return "\n".join(lines)

    def plain(self) -> str:
        """The same without rich: of the packages those that are needed and do not work."""
        missing = [p for p in self.packages if p.required and p.problem is not None]
        return self.text("\n".join(f"{p.name}: {p.problem}" for p in missing))


def look_around() -> Found:
    """Imports each package that fastres names, and asks each backend."""
    packages = tuple(_package(*entry) for entry in _wanted())
    if any(p.name == "torch" and p.problem is not None for p in packages):
        return Found(packages, (BackendState("all", "torch does not work"),), {})
    return Found(packages, tuple(_backends()), _gpu())


def _wanted() -> list[tuple[str, str, str]]:
    """Name, requirement and purpose of each package, as fastres's own metadata has them."""
    found: dict[str, tuple[str, str, str]] = {}
    for line in _declared():
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


def _declared() -> list[str]:
    """Requirements as our metadata write them; those of a checkout that is not installed."""
    try:
        return metadata.requires("fastres") or []
    except metadata.PackageNotFoundError:
        pass
    project = Path(__file__).parents[1] / "pyproject.toml"
    if not project.exists():
        return []
    table = tomllib.loads(project.read_text())["project"]
    optional = (line for lines in table["optional-dependencies"].values() for line in lines)
    return [*table["dependencies"], *(f"{line}; extra" for line in optional)]


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
