"""A file written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Writes beside `path`, then renames: a reader sees the old file or the new one.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    temporary = ""
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
