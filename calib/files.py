"""A file written whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes beside `path`, then renames: a reader sees the old file or the new one.

    A link stays, and what it points to is written.

    Raises:
        OSError: it cannot be written, or is a device, a pipe or a folder; nothing is left behind.
    """
    path, temporary = Path(os.path.realpath(path)), ""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file, and is left alone", str(path))
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:  # also an interrupt
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise
