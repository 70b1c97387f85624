"""The directory of a zip file of torch.save, held to what it can only mean one way.

PyTorch finds the parts of a zip file by code of its own. What is counted here must be what it will
read: so there is one directory, right before the end; no name stands twice, however it is spelt;
and each part is as long as the pickle says.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Mapping
from typing import BinaryIO

from fastres.checkpoints.pickles import Storage
from fastres.wording import named

PICKLE = "data.pkl"
_MOST_PICKLED = 1 << 24  # bytes of the pickle: some hundred for each tensor
_MOST_LISTED = 1 << 22  # bytes of the directory
_MOST_BESIDE = 1 << 16  # bytes of any other part that holds no weights
_END, _END_64, _LOCATOR_64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


class Ambiguous(Exception):
    """A zip file that is damaged or forged; says how."""


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """The zip file, if it has one end and a directory of a size that weights need.

    Raises:
        Ambiguous: it is damaged, or other readers could find another directory.
    """
    count = _directory(file)
    archive = zipfile.ZipFile(file)
    if len(archive.infolist()) != count:
        raise Ambiguous("its directory lists more or less than its end says")
    return archive


def parts(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The parts of a zip file, by their names without the folder that they lie in.

    Raises:
        Ambiguous: they lie in several, two have one name, or one is not as torch.save makes it.
    """
    listed = archive.infolist()
    if len({part.filename.lower() for part in listed}) < len(listed):
        raise Ambiguous("two of its parts have one name")
    if len({part.filename.partition("/")[0] for part in listed}) > 1:
        raise Ambiguous("its parts lie in several folders")
    for part in listed:
        packed = part.compress_type not in (_STORED, _DEFLATED) or part.flag_bits & 1
        stored = part.compress_type == _STORED
        if packed or (stored and part.file_size != part.compress_size):
            raise Ambiguous(f"{named(part.filename)} is not packed as PyTorch packs it")
        if part.filename != part.orig_filename:
            raise Ambiguous(f"{named(part.orig_filename)} is no name of a part")
    return {part.filename.partition("/")[2]: part for part in listed}


def pickled(archive: zipfile.ZipFile, found: Mapping[str, zipfile.ZipInfo]) -> bytes:
    """The pickle, once nothing but weights is large.

    Raises:
        Ambiguous: a part is too large.
    """
    for name, part in found.items():
        most = _MOST_PICKLED if name == PICKLE else _MOST_BESIDE
        if not name.startswith("data/") and part.file_size > most:
            raise Ambiguous(f"{named(name)} takes {part.file_size} bytes; it has at most {most}")
    return archive.read(found[PICKLE])


def check_storages(storages: Iterable[Storage], found: Mapping[str, zipfile.ZipInfo]) -> None:
    """Holds each storage to the part that it lies in.

    Raises:
        Ambiguous: there is none, or one of another size.
    """
    for storage in storages:
        part = found.get(f"data/{storage.key}")
        if part is None or part.file_size != storage.size:
            size = "missing" if part is None else f"{part.file_size} bytes long"
            raise Ambiguous(f"the storage {storage.key} of {storage.size} bytes is {size}")


def _directory(file: BinaryIO) -> int:
    """How many parts are listed right before the end of the file."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 98))
    tail = file.read()
    if tail[-22:-18] != _END or tail[-2:] != b"\0\0":
        raise Ambiguous("it does not end as a zip file does")
    here, total, length, start = _numbers("<2H2L", tail[-14:-2])
    at = size - 22
    if tail[-42:-38] == _LOCATOR_64:
        at -= 76
        (at_64,) = _numbers("<Q", tail[-34:-26])
        wide = _numbers("<4Q", tail[24:56])
        narrow = zip((here, total, length, start), wide, (16, 16, 32, 32), strict=True)
        if tail[:4] != _END_64 or at_64 != at:
            raise Ambiguous("it has two ends")
        if any(short not in (long, 2**bits - 1) for short, long, bits in narrow):
            raise Ambiguous("its two ends contradict each other")
        here, total, length, start = wide
    if here != total or start + length != at:
        raise Ambiguous("its directory is not where its end says")
    if length > _MOST_LISTED:
        raise Ambiguous(f"its directory takes {length} bytes; that of weights {_MOST_LISTED}")
    return total


def _numbers(form: str, data: bytes) -> tuple[int, ...]:
    if len(data) != struct.calcsize(form):
        raise Ambiguous("it does not end as a zip file does")
    return struct.unpack(form, data)
