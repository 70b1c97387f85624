"""Files that are read only if they are files, and written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from fastres.calib.unfinished import put_in_place, unfinished

MOST_BYTES = 1 << 28  # of a file that is read into memory whole


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """A regular file, opened for reading: pipes, devices and folders are refused, not waited for.

    Raises:
        OSError: there is no such file, it is none, or cannot be opened.
    """
    name = os.fspath(path)
    try:
        _check_regular(os.stat(name), name)  # opening a device may have effects
        handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK)  # it may be another by now
    except ValueError as error:  # a NUL in it
        raise FileNotFoundError(errno.ENOENT, "no file can have this name", name) from error
    file = os.fdopen(handle, "rb")
    try:
        _check_regular(os.fstat(handle), name)
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a regular file of at most so many bytes.

    Raises:
        OSError: as `open_regular`, or it is larger.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it is larger than {most} bytes", os.fspath(path))
    return data


def _check_regular(found: os.stat_result, name: str) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EISDIR, "it is a folder", name)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, and no regular file", name)


def write_whole(path: Path, data: bytes) -> None:
    """Writes beside `path`, then renames: a reader sees the old file or the new one.

    A link stays, and what it points to is written.

    Raises:
        OSError: it cannot be written, or is a device, a pipe or a folder; nothing is left behind.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file, and is left alone", str(path))
    with unfinished(path) as temporary:
        with temporary.open("r+b") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        put_in_place(temporary, path)
