"""Where a saved engine's files lie: a folder, or one zip; written whole or not at all.

Two seals make every changed byte show. `manifest.sha256` holds the digest of the manifest, which
holds the digests of the other files. A zip ends in a comment with the digest of all bytes before
it, so it is known to be sound before its directory is even looked at.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import re
import stat
import weakref
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fastres.calib.unfinished import put_in_place, sync_folder, unfinished
from fastres.errors import ArtifactError

if TYPE_CHECKING:  # which imports PyTorch; a deployed engine is read without it
    from fastres.options import PathLike

MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
MARK = b'"format": "fastres-engine"'
_MANIFEST_LIMIT = 16 * 2**20
_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")
_ZIP_SEAL = b"sha256:"
_HEX = 64
_FILES = 64  # of one engine, which has four and a few that are compiled
_TRIES = 100


class Container(Protocol):
    """The files of one saved engine, opened for reading; `sizes` lists them all."""

    path: Path
    sizes: dict[str, int]

    def read(self, name: str) -> bytes:
        """The content of a listed file."""


def defect(path: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{path}: {what}")


def place(path: PathLike) -> Path:
    """Where a saved engine lies or shall lie, as a path that can be asked about.

    Raises:
        ArtifactError: it is no path, or one that the file system cannot have.
    """
    if path == "":
        raise ArtifactError("'' cannot be a saved engine's path: it is empty")
    try:
        where = Path(path)
        where.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # for the reader or writer to tell
    except (TypeError, ValueError, OSError) as error:
        what = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{path!r} cannot be a saved engine's path: {what}") from error
    return where


def open_container(path: Path) -> Container:
    """Opens a saved engine, whichever form it has.

    Raises:
        ArtifactError: there is nothing, it is neither form, it was altered, or it holds names or
            kinds of files that a saved engine never has.
    """
    try:
        if path.is_dir():
            return _Folder(path)
        if path.is_file():
            return _Zip(path)
    except OSError as error:
        raise defect(path, f"cannot be read: {error}") from error
    raise defect(path, "there is no saved engine here: neither a folder nor a file")


def read_manifest(container: Container) -> bytes:
    """The manifest, once its seal was found whole."""
    for name in (MANIFEST, SEAL):
        if name not in container.sizes:
            raise defect(container.path, f"there is no {name}: no saved engine, or half of one")
    if container.sizes[MANIFEST] > _MANIFEST_LIMIT:
        size = container.sizes[MANIFEST]
        raise defect(container.path, f"{MANIFEST} has {size} bytes; no manifest is that large")
    manifest = container.read(MANIFEST)
    wanted = seal(manifest)
    if container.sizes[SEAL] != len(wanted) or container.read(SEAL) != wanted:
        raise defect(
            container.path, f"{MANIFEST} or {SEAL} was altered: they do not fit. Copy it anew"
        )
    return manifest


def seal(manifest: bytes) -> bytes:
    """The content of manifest.sha256, in the form that the tool sha256sum reads."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


class _Folder:
    """Its files are opened at once: one that is replaced meanwhile is read to its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handles = _opened(path)
        weakref.finalize(self, _close, self._handles.values())
        self.sizes = {name: os.fstat(handle).st_size for name, handle in self._handles.items()}

    def read(self, name: str) -> bytes:
        try:
            with open(self._handles[name], "rb", closefd=False) as file:
                file.seek(0)
                return file.read(self.sizes[name] + 1)
        except OSError as error:
            raise defect(self.path, f"{name} cannot be read: {error}") from error


def _opened(path: Path) -> dict[str, int]:
    """Handles of all files of a folder, as it is at one moment.

    A saved engine is replaced as a whole, and what was replaced is removed: so it was whole as long
    as the path led to it.

    Raises:
        OSError: it cannot be read.
        ArtifactError: it holds what a saved engine never has.
    """
    for _ in range(_TRIES):
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        handles: dict[str, int] = {}
        try:
            _open_files(path, folder, handles)
            if _leads_to(path, folder):
                found, handles = handles, {}
                return found
        except (OSError, ArtifactError):
            if _leads_to(path, folder):
                raise
        finally:
            _close((folder, *handles.values()))
    raise defect(path, f"it was replaced {_TRIES} times while it was opened: try again")


def _open_files(path: Path, folder: int, handles: dict[str, int]) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            _check_name(path, entry.name)
            if not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                raise defect(path, f"{entry.name} is a link or no file at all; not followed")
            if len(handles) == _FILES:
                raise defect(path, f"it holds more than {_FILES} files; no saved engine does")
            handles[entry.name] = os.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)


def _leads_to(path: Path, folder: int) -> bool:
    return os.path.samestat(path.stat(), os.fstat(folder))


def _close(handles: Iterable[int]) -> None:
    for handle in handles:
        os.close(handle)


class _Zip:
    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise defect(path, "this is no saved engine: the file is no zip")
            file.seek(0)
            data = file.read()
        body, given = memoryview(data)[:-_HEX], data[-_HEX:]
        if bytes(body[-len(_ZIP_SEAL) :]) != _ZIP_SEAL:
            raise defect(
                path,
                "the seal at its end is missing: cut short, or not written by fastres",
            )
        if hashlib.sha256(body).hexdigest().encode() != given:
            raise defect(path, "its bytes were altered: they do not fit the seal. Copy it anew")
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except Exception as error:  # a zip made to mislead: zipfile raises many kinds
            raise defect(path, f"its directory cannot be read: {error}") from error
        self.sizes: dict[str, int] = {}
        for info in self._zip.infolist():
            _check_name(path, info.orig_filename)
            if info.filename in self.sizes:
                raise defect(path, f"{info.filename} is in it twice")
            kind, size = stat.S_IFMT(info.external_attr >> 16), info.file_size
            stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == size
            if not stored or kind not in (0, stat.S_IFREG):
                raise defect(path, f"{info.filename} is compressed, or a link; neither is read")
            self.sizes[info.filename] = size

    def read(self, name: str) -> bytes:
        try:
            return self._zip.read(name)
        except Exception as error:  # a zip made to mislead: zipfile raises many kinds
            raise defect(self.path, f"{name} cannot be read: {error}") from error


def _check_name(path: Path, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise defect(path, f"it holds {name!r}, which is no file of a saved engine; it is not read")


def write(path: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files to a folder, or to one zip where the path ends in .fastres.

    All is written and flushed to disk under another name first, and then put in place in one step:
    a reader finds the old engine or the new one, whoever else saves there, and so does the next
    process where this one is killed.

    Raises:
        ArtifactError: the path holds something that is no saved engine, or cannot be written.
    """
    path = Path(os.path.abspath(path))
    check_replaceable(path, files)
    in_one = path.suffix == ".fastres"
    try:
        with unfinished(path, folder=not in_one) as temporary:
            (_write_zip if in_one else _write_folder)(temporary, files)
            put_in_place(temporary, path)
    except OSError as error:
        raise defect(path, f"cannot be written: {error.strerror or error}") from error


def check_replaceable(path: Path, files: Collection[str] | None = None) -> None:
    """Tells before anything is written, or even made, that an engine cannot be saved there.

    Args:
        files: that are to be written; others beside them are not replaced. None: not known yet.

    Raises:
        ArtifactError: the path holds something that is no saved engine, or its folder is missing.
    """
    path = Path(os.path.abspath(path))
    if not path.parent.is_dir():
        raise defect(path, f"the folder {path.parent} does not exist; make it first")
    if path.is_symlink():
        raise defect(path, "this is a symbolic link and is left alone; save to what it points to")
    if not path.exists():
        return
    strangers: set[str] = set()
    try:
        container = open_container(path)
        strangers = set() if files is None else set(container.sizes) - set(files)
        ours = not strangers and MARK in read_manifest(container)
    except ArtifactError as error:
        raise ArtifactError(f"{error}. It is left alone: delete it, or save elsewhere") from error
    if not ours:
        what = f"it also holds {', '.join(sorted(strangers)[:5])}" if strangers else "not an engine"
        raise defect(path, f"this is left alone ({what}): delete it, or save elsewhere")


def _write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        with (path / name).open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    sync_folder(path)


def _write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    with path.open("r+b") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.comment = _ZIP_SEAL + b"0" * _HEX
            for name, data in files.items():
                info = zipfile.ZipInfo(name)  # dated 1980: the same engine is the same bytes
                info.external_attr = (stat.S_IFREG | 0o644) << 16
                archive.writestr(info, data)
        file.flush()
        with mmap.mmap(file.fileno(), 0) as view:
            digest = hashlib.sha256(memoryview(view)[:-_HEX]).hexdigest()
            view[-_HEX:] = digest.encode()
            view.flush()
        os.fsync(file.fileno())
