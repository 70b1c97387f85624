"""Which tile was fastest: tables of measurements by GPU, shipped or in the user's cache.

A table belongs to one kind of GPU, one version of Triton and one state of the kernels' sources. An
entry says which tile a step is best cut into, and how long it took; what a step is, its key says:
shapes, strides, epilogue and dtype, but no names.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from fastres.backends.triton.plan import AnyStep
from fastres.errors import ArtifactError, InputError
from fastres.options import PathLike, Sizes


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fastest tile of one step, and the median of its time in microseconds."""

    tile: dict[str, Any]
    microseconds: float


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What measurements hold for.

    Args:
        gpu: its name, as "NVIDIA H200".
        sm_count: its SMs.
        triton: version.
        kernels: digest of the kernels' sources.
    """

    gpu: str
    sm_count: int
    triton: str
    kernels: str

    @property
    def file(self) -> str:
        """The table's file name; SXM and PCIe cards have names of their own."""
        name = re.sub(r"[^a-z0-9]+", "_", self.gpu.lower()).strip("_")
        return f"tiles_{name}_{self.sm_count}sm.json"


class Table(msgspec.Struct, forbid_unknown_fields=True):
    """Measurements of one machine, by the key of a step."""

    machine: Machine
    entries: dict[str, Entry] = {}

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=1) + b"\n"


def key_of(step: AnyStep, shapes: Mapping[str, Sizes], precision: str) -> str:
    """What a step is, without the names of its tensors: equal for steps of equal cost.

    Args:
        shapes: of the plan's tensors and of the packed constants.
    """
    fields = msgspec.to_builtins(step)
    parts = [fields.pop("type"), precision]
    for name, value in fields.items():
        if name in ("node", "tile"):
            continue
        parts.append(f"{name}={_anonymous(value, shapes)}")
    return " ".join(parts)


def _anonymous(value: object, shapes: Mapping[str, Sizes]) -> str:
    if isinstance(value, str) and value in shapes:
        return "x".join(str(size) for size in shapes[value])
    if isinstance(value, Mapping):
        return ",".join(f"{k}:{_anonymous(v, shapes)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ",".join(_anonymous(v, shapes) for v in value)
    return str(value)


def read_table(path: Path, machine: Machine) -> Table:
    """The table in a file, empty if there is none or if it holds for another machine.

    Raises:
        ArtifactError: the file is no table.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Table(machine)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    try:
        table = msgspec.json.decode(data, type=Table)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is no table of tiles: {error}. Remove it") from error
    return table if table.machine == machine else Table(machine)


def write_table(path: Path, table: Table) -> None:
    """Writes a table in one go, so that a reader never sees half of it.

    Raises:
        ArtifactError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_bytes(table.to_json())
        part.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error}") from error


def cache_path(machine: Machine, cache_dir: PathLike | None = None) -> Path:
    """Where the user's own measurements lie: `cache_dir`, else $XDG_CACHE_HOME or ~/.cache.

    Raises:
        InputError: `cache_dir` is no path.
    """
    if cache_dir is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastres"
    else:
        try:
            root = Path(cache_dir)
        except TypeError:
            raise InputError(f"cache_dir is {cache_dir!r}; give a folder") from None
    return root / machine.file


def shipped(machine: Machine) -> Table:
    """The measurements that come with fastres for this GPU; empty if there are none.

    Those of other versions of Triton or of the kernels are taken as well: they are measurements
    still, if of something else by a little.
    """
    source = resources.files("fastres.backends.triton") / "tables" / machine.file
    if not source.is_file():
        return Table(machine)
    return msgspec.json.decode(source.read_bytes(), type=Table)


@cache
def kernels_digest() -> str:
    """SHA-256 over the kernels' sources, shortened."""
    digest = hashlib.sha256()
    folder = resources.files("fastres.kernels")
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".py"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]
