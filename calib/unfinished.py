"""Names for what is not whole yet, and the one step that puts it where it belongs.

Whoever writes holds a lock on what he writes, which ends with his process. So what bears such a
name and is not locked was left by one that was killed: the next to write beside it removes it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ENDING = ".fastres.tmp"
_NAME = re.compile(r"\.[0-9a-f]{16}" + re.escape(_ENDING))
_IN_THE_WAY = {errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST}
_CANNOT = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextmanager
def unfinished(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new, empty file or folder beside `path`; whatever bears its name in the end is removed.

    Raises:
        OSError: nothing can be made there.
    """
    sweep(path.parent)
    temporary, handle = path, -1
    try:
        while handle < 0:
            # the name does not depend on the path's, which may be as long as names can be
            temporary = path.with_name(f".{secrets.token_hex(8)}{_ENDING}")
            handle = _begin(temporary, folder)
        yield temporary
    finally:
        try:
            _remove(temporary, but=path)
        except KeyboardInterrupt:  # of what is half removed nothing stays; a second one ends that
            _remove(temporary, but=path)
            raise
        finally:
            if handle >= 0:
                os.close(handle)


def put_in_place(temporary: Path, path: Path) -> None:
    """Gives a file or folder the name `path` in one step: at no moment is there none, or half.

    A file or folder that was there has the other name afterwards, or is gone.

    Raises:
        OSError: it cannot be renamed, or a folder cannot be replaced on this file system; nothing
            is changed.
    """
    try:
        _rename(temporary, path)
    except FileNotFoundError:  # what was in the way has gone meanwhile
        os.rename(temporary, path)
    sync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Removes what writers that were killed have left in a folder; what may not be, stays."""
    names: list[str] = []
    with suppress(OSError), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if _NAME.fullmatch(entry.name)]
    for name in names:
        with suppress(OSError):  # another sweeps, it is another user's, or there are no locks here
            handle = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder / name)
            finally:
                os.close(handle)


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _begin(temporary: Path, folder: bool) -> int:
    """Makes it, and a handle that holds the lock; -1 if a sweep took it before it was locked."""
    if folder:
        temporary.mkdir()
    else:
        temporary.touch(exist_ok=False)
    try:
        handle = os.open(temporary, os.O_RDONLY)
    except FileNotFoundError:
        return -1
    with suppress(FileNotFoundError):
        if _hold(handle) and os.path.samestat(os.fstat(handle), os.lstat(temporary)):
            return handle
    os.close(handle)
    return -1


def _hold(handle: int) -> bool:
    """Whether no sweep holds it; on a file system without locks none ever does."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _rename(temporary: Path, path: Path) -> None:
    try:
        os.rename(temporary, path)
    except OSError as error:
        if error.errno not in _IN_THE_WAY:
            raise
        _exchange(temporary, path)


def _exchange(one: Path, other: Path) -> None:
    """renameat2 with RENAME_EXCHANGE, for which Python has no call."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        number = errno.ENOSYS
    elif call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return
    else:
        number = ctypes.get_errno()
    what = os.strerror(number)
    if number in _CANNOT:
        what = "this file system cannot replace a folder in one step: delete it first"
    raise OSError(number, what, str(other))


def _remove(path: Path, but: Path | None = None) -> None:
    """As far as that is possible: the next sweep takes the rest."""
    with suppress(OSError):
        if path == but:
            return
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.exists():  # unlink fails on a read-only disk even where there is nothing
            path.unlink()
