"""Which tile was fastest: tables of measurements by GPU, shipped or in the user's cache.

A table belongs to one kind of GPU, one version of Triton and one state of the kernels' sources. An
entry says which tile is best for a problem, and how long it took. What is shipped for a GPU that
has not run yet holds estimates: the best tiles of those that compile for it without spilling.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch

from fastres.backends.triton.planning.problems import TILE_OF, AnyTile, Problem
from fastres.calib.files import read_regular, write_whole
from fastres.errors import ArtifactError
from fastres.kernels.cost import Target
from fastres.options import cache_folder

TYPICAL = {90: "NVIDIA H200"}  # GPUs that tables are shipped for, by the names drivers give them


_MOST_BYTES = 32 << 20  # of a table; one problem takes some 250


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fastest tile of one problem, and the median of its time in microseconds.

    Args:
        measured: or estimated, when the table was written; what reads the table estimates anew.
    """

    tile: dict[str, Any]
    microseconds: Annotated[float, msgspec.Meta(gt=0.0, lt=1e12)]
    measured: bool = True


@dataclass(frozen=True)
class Best:
    """A tile and its time.

    Args:
        seconds: measured, else the estimate.
        estimate: by the model, of what is measured, too: measured and estimated times are never
            compared with each other.
    """

    tile: AnyTile
    seconds: float
    measured: bool
    estimate: float


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


def this_machine(device: torch.device) -> Machine:
    """What measurements made here hold for."""
    version = _triton_version()
    if device.type != "cuda":
        return Machine("interpreter", 1, version, kernels_digest())
    properties = torch.cuda.get_device_properties(device)
    sm_count = properties.multi_processor_count
    return Machine(properties.name, sm_count, version, kernels_digest())


def _triton_version() -> str:
    """ "none" where there is none: machine code does without."""
    try:
        return metadata.version("triton")  # which takes no import
    except metadata.PackageNotFoundError:
        try:
            import triton
        except ImportError:
            return "none"
        return str(triton.__version__)


class Table(msgspec.Struct, forbid_unknown_fields=True):
    """What is known of one machine, by the key of a problem."""

    machine: Machine
    entries: dict[str, Entry] = {}

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=1) + b"\n"


class Tiles:
    """The best known tile of each problem: a table's where one has it, else by estimate.

    Args:
        tables: asked in this order.
        library: the vendor's that is here (`vendor.library`), whose measurements count; None where
            all is to run in kernels of ours.
    """

    def __init__(
        self, target: Target, tables: Sequence[Table] = (), library: str | None = None
    ) -> None:
        self.target = target
        self.library = library
        self._tables = tables
        self._known: dict[Problem, Best] = {}
        self.banned: dict[tuple[str, AnyTile], str] = {}  # by problem: unfit tiles, and why

    def best(self, problem: Problem) -> Best:
        """The tile to take.

        Raises:
            ValueError: no tile can run the problem.
        """
        if problem not in self._known:
            self._known[problem] = self._looked_up(problem) or self._estimated(problem)
        return self._known[problem]

    def ban(self, problem: str, tile: AnyTile, reason: str) -> None:
        """Takes a tile out of the choice for a problem, given by its key, from now on."""
        self.banned[problem, tile] = reason
        self._known = {known: best for known, best in self._known.items() if known.key != problem}

    def asked(self) -> list[Problem]:
        """Every problem so far, in order."""
        return list(self._known)

    def _looked_up(self, problem: Problem) -> Best | None:
        for table in self._tables:
            entry = table.entries.get(problem.key)
            if entry is None:
                continue
            try:
                tile = msgspec.convert(entry.tile, TILE_OF[problem.kind])
            except msgspec.ValidationError:
                continue  # of another version of the kernels
            if (problem.key, tile) not in self.banned and problem.takes(tile, self.target):
                return self._best(problem, tile, entry)
        return None

    def _estimated(self, problem: Problem) -> Best:
        every = problem.candidates(self.target)
        candidates = [tile for tile in every if (problem.key, tile) not in self.banned]
        if not candidates:
            tried = "".join(f"\n  {self.banned[problem.key, tile]}" for tile in every)
            raise ValueError(f"no tile can run {problem.key} on sm_{self.target.sm}{tried}")
        return self._best(problem, candidates[0])

    def _best(self, problem: Problem, tile: AnyTile, entry: Entry | None = None) -> Best:
        estimate = problem.seconds(tile, self.target)
        if entry is None or not entry.measured:
            return Best(tile, estimate, False, estimate)
        return Best(tile, entry.microseconds * 1e-6, True, estimate)


def read_table(path: Path, machine: Machine) -> Table:
    """The table in a file, empty if there is none or if it holds for another machine.

    Raises:
        ArtifactError: the file is no table.
    """
    try:
        data = read_regular(path, _MOST_BYTES)
    except FileNotFoundError:
        return Table(machine)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    try:
        table = msgspec.json.decode(data, type=Table)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path} is no table of tiles: {error}. Remove it") from error
    return table if table.machine == machine else Table(machine)


def write_table(path: Path, table: Table) -> None:
    """Writes a table in one go, so that a reader never sees half of it.

    Raises:
        ArtifactError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, table.to_json())
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error}") from error


def cache_path(machine: Machine, cache_dir: str | None = None) -> Path:
    """Where the user's own measurements lie."""
    return cache_folder(cache_dir) / machine.file


def shipped(machine: Machine) -> Table:
    """The table that comes with fastres for this GPU; empty if there is none.

    That of other versions of Triton or of the kernels is taken as well: measurements they are
    still, if of something else by a little.
    """
    source = resources.files("fastres.backends.triton.planning") / "tables" / machine.file
    if not source.is_file():
        return Table(machine)
    return msgspec.json.decode(source.read_bytes(), type=Table)


def shipped_for(target: Target) -> list[Table]:
    """What comes with fastres for the GPU that stands for a target which is not here."""
    name = TYPICAL.get(target.sm)
    return [] if name is None else [shipped(Machine(name, target.sm_count, "", ""))]


@cache
def kernels_digest() -> str:
    """SHA-256 over the kernels' sources, shortened."""
    return digest_of(resources.files("fastres.kernels"))


def digest_of(folder: Traversable) -> str:
    """SHA-256, shortened, over every Python file in a tree: its path from there, what it holds."""
    digest = hashlib.sha256()
    for name, data in _sources(folder):
        digest.update(name.encode() + data)
    return digest.hexdigest()[:16]


def _sources(folder: Traversable, above: str = "") -> Iterator[tuple[str, bytes]]:
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.is_dir():
            yield from _sources(file, f"{above}{file.name}/")
        elif file.name.endswith(".py"):
            yield above + file.name, file.read_bytes()
