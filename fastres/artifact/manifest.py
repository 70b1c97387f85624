"""What every reader of a saved engine checks before it takes a file out: format, schema and files.

Imports no PyTorch: `fastres.load` and `fastres.deploy.load` refuse the same engines.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from fastres.artifact.container import MANIFEST, SEAL, Container, defect, read_manifest
from fastres.errors import ArtifactError
from fastres.version import __version__

SCHEMA = 2  # 1 had no compiled parts
GRAPH = "graph.json"
WEIGHTS = "weights.safetensors"
_COMPILED = re.compile(r"compiled_[a-z0-9_]+\.[a-z0-9]+")


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


class Header(msgspec.Struct, frozen=True):
    """The part of a manifest that every schema has."""

    format: Literal["fastres-engine"]
    schema: int


def known_manifest(container: Container) -> bytes:
    """The manifest, once its seal was found whole and its schema one that is read here.

    Raises:
        ArtifactError: it is damaged, not fastres's, or newer than this version.
    """
    text = read_manifest(container)
    try:
        header = msgspec.json.decode(text, type=Header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise defect(container.path, f"{MANIFEST} is not fastres's: {error}") from error
    if header.schema > SCHEMA:
        raise defect(
            container.path,
            f"written by schema {header.schema}, this fastres ({__version__}) reads up to "
            f"{SCHEMA}: upgrade fastres",
        )
    if header.schema < 1:
        raise defect(container.path, f"{MANIFEST} says schema {header.schema}; the first is 1")
    return text


def check_files(container: Container, files: Mapping[str, FileEntry]) -> None:
    """Refuses an engine that holds other files than its manifest lists, or of other sizes.

    Raises:
        ArtifactError: naming them.
    """
    if {name for name in files if not _COMPILED.fullmatch(name)} != {GRAPH, WEIGHTS}:
        raise defect(
            container.path,
            f"{MANIFEST} lists {sorted(files)}; it should list {[GRAPH, WEIGHTS]} and "
            "compiled parts",
        )
    present, wanted = set(container.sizes), {MANIFEST, SEAL, *files}
    if missing := sorted(wanted - present):
        raise defect(container.path, f"{', '.join(missing)} is missing. Copy the engine anew")
    if strange := sorted(present - wanted):
        raise defect(
            container.path, f"{', '.join(strange)} is no part of it. Remove it if it is yours"
        )
    for name, entry in files.items():
        if (size := container.sizes[name]) != entry.size:
            raise defect(
                container.path, f"{name} has {size} bytes, {entry.size} were written. Copy it anew"
            )


def checked(container: Container, name: str, entry: FileEntry) -> bytes:
    """A listed file's content, if its digest is that of the manifest.

    Raises:
        ArtifactError: it was altered.
    """
    data = container.read(name)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise defect(container.path, f"{name} was altered: its SHA-256 differs. Copy it anew")
    return data


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Says of which engine it is, where what an engine holds is refused by who knows no paths."""
    try:
        yield
    except ArtifactError as error:
        raise defect(path, str(error)) from error
