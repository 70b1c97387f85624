"""An engine's bytes in a saved engine: where they were built, and when they may be used again.

    compiled_tensorrt.json    what built it, for which GPU, shapes and network; its layers
    compiled_tensorrt.plan    the bytes

A plan is code that TensorRT runs as it is. It is used where the caller trusts the file, and module,
version, GPU, shapes and network are the same; otherwise the engine is built anew, and says why.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from fastres.backends.parts import read_part
from fastres.backends.tensorrt.api import package_of
from fastres.backends.tensorrt.plan import Built, Layer, Range
from fastres.errors import ArtifactError

if TYPE_CHECKING:
    from fastres.backends.base import CompiledParts

ABOUT = "compiled_tensorrt.json"
PLAN = "compiled_tensorrt.plan"


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a plan was built with and from.

    Args:
        builder: module and version, as "tensorrt 10.16.0".
        architecture: such as "sm_90".
        gpu: its name; empty where it was built on a machine without one.
        ranges: input shapes: smallest, usual, largest.
        settings: what else changes the plan.
        network: SHA-256 of the ONNX that it was built from.
    """

    builder: str
    architecture: str
    gpu: str
    ranges: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    settings: str
    network: str

    def differs(self, wanted: Origin) -> str | None:
        """Why a plan of this origin is not what is wanted; None if it is."""
        if self.network != wanted.network:
            return "it was built from another network or other weights"
        for what in ("architecture", "ranges", "settings"):
            own, other = getattr(self, what), getattr(wanted, what)
            if own != other:
                return f"its {what} is {own}, here it is {other}"
        if self.builder != wanted.builder:
            package = package_of(self.builder)
            advice = "" if package is None else f"; pip install {package}"
            return f"its builder is {self.builder}, here it is {wanted.builder}{advice}"
        if "" not in (self.gpu, wanted.gpu) and self.gpu != wanted.gpu:
            return f"it was built on {self.gpu}, here is {wanted.gpu}"
        return None


class About(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of compiled_tensorrt.json."""

    origin: Origin
    plan: str  # SHA-256
    layers: tuple[Layer, ...]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def as_ranges(
    ranges: Mapping[str, Range],
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    return {name: (r.smallest, r.usual, r.largest) for name, r in ranges.items()}


def write_plan(origin: Origin, built: Built) -> dict[str, bytes]:
    """Both files, by name."""
    about = About(origin, digest(built.plan), built.layers)
    return {ABOUT: msgspec.json.format(msgspec.json.encode(about), indent=1), PLAN: built.plan}


def read_about(files: Mapping[str, bytes]) -> About | None:
    """The description of a plan; None if there is none.

    Raises:
        ArtifactError: it is damaged.
    """
    if ABOUT not in files:
        return None
    about = read_part(ABOUT, files[ABOUT], About)
    for what in ("builder", "architecture", "gpu", "settings"):  # which are shown on terminals
        if not getattr(about.origin, what).isprintable():
            raise ArtifactError(f"{ABOUT} cannot be read: its {what} is no name")
    return about


def read_plan(files: Mapping[str, bytes]) -> tuple[Origin, Built] | None:
    """What the files hold; None if there are none.

    Raises:
        ArtifactError: they are damaged.
    """
    about, plan = read_about(files), files.get(PLAN)
    if about is None and plan is None:
        return None
    if about is None or plan is None:
        missing = ABOUT if about is None else PLAN
        raise ArtifactError(f"{missing} is missing. Copy the engine anew")
    if digest(plan) != about.plan:
        raise ArtifactError(f"{PLAN} is not the one that {ABOUT} is about. Copy the engine anew")
    return about.origin, Built(plan, about.layers, b"")


def usable(parts: CompiledParts, wanted: Origin, *, runs: bool) -> tuple[Built | None, str | None]:
    """The stored plan, if it may be used; or why what is there may not.

    Args:
        runs: whether it is to be run, which takes trust, or only looked at.

    Raises:
        ArtifactError: the files are damaged.
    """
    stored = read_plan(parts.files)
    if stored is None:
        return None, None
    origin, built = stored
    why = origin.differs(wanted)
    if why is None and runs and not parts.trusted:
        why = (
            "TensorRT would run whatever it holds; where you trust the file, "
            "fastres.load(path, trust_engine=True) takes it as it is"
        )
    if why is not None:
        return None, f"the engine's TensorRT plan was left alone, and built anew: {why}"
    return built, None
