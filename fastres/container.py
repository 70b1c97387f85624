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
import secrets
import shutil
import stat
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

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
    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes: dict[str, int] = {}
        with os.scandir(path) as entries:
            for entry in entries:
                _check_name(path, entry.name)
                status = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode):
                    raise defect(path, f"{entry.name} is a link or no file at all; not followed")
                self.sizes[entry.name] = status.st_size

    def read(self, name: str) -> bytes:
        try:
            handle = os.open(self.path / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            with open(handle, "rb") as file:
                return file.read(self.sizes[name] + 1)
        except OSError as error:
            raise defect(self.path, f"{name} cannot be read: {error}") from error


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

    All is written and flushed to disk under another name first, then renamed. A zip replaces a zip
    in one step; a folder is moved aside for the moment of the renaming.

    Raises:
        ArtifactError: the path holds something that is no saved engine, or cannot be written.
    """
    path = Path(os.path.abspath(path))
    check_replaceable(path, files)
    write_form: Callable[[Path, Mapping[str, bytes]], None]
    write_form = _write_zip if path.suffix == ".fastres" else _write_folder
    temporary = _sibling(path)
    try:
        write_form(temporary, files)
        _publish(temporary, path)
    except OSError as error:
        raise defect(path, f"cannot be written: {error.strerror or error}") from error
    finally:
        _remove(temporary)


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
    path.mkdir()
    for name, data in files.items():
        with (path / name).open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    _sync_folder(path)


def _write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    with path.open("x+b") as file:
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


def _publish(temporary: Path, path: Path) -> None:
    """Renames `temporary` to `path`, over a saved engine that may be there."""
    if path.is_dir() or (path.exists() and temporary.is_dir()):
        aside = _sibling(path)
        os.rename(path, aside)
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(aside, path)
            raise
        _remove(aside)
    else:
        os.replace(temporary, path)
    _sync_folder(path.parent)


def _sibling(path: Path) -> Path:
    # the name does not depend on the path's, which may be as long as names can be
    return path.with_name(f".{secrets.token_hex(8)}.fastres.tmp")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():  # unlink fails on a read-only disk even where there is nothing
        path.unlink()


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
