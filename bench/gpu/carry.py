"""What is worth carrying away from a machine with a GPU: few small files, whole at any moment.

Everything else that a run needs to go on, compile caches above all, stays in its own folder.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOST = 8  # files
LARGEST = 16 * 2**20  # bytes of each
EVERY_S = 5.0
# in order of worth: results, measured tiles, what was measured of kernels and beside peers
_WORTH = ("gpu.jsonl", "tiles_*.json", "kernels.json", "bench-*.json", "*.html")


@contextmanager
def carrying(out: Path, carry: Path | None) -> Iterator[None]:
    """Copies results every few seconds, and once more at the end; begins with those that are there.

    Args:
        out: where a run works. What was carried away from another machine is put there first.
        carry: the folder to be carried away; None for none.
    """
    if carry is None:
        yield
        return
    carry.mkdir(parents=True, exist_ok=True)
    for path in carry.iterdir():
        if path.is_file() and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)
    ended = threading.Event()

    def again() -> None:
        while not ended.wait(EVERY_S):
            copy(out, carry)

    worker = threading.Thread(target=again, daemon=True)
    worker.start()
    try:
        yield
    finally:
        ended.set()
        worker.join()
        copy(out, carry)


def copy(out: Path, carry: Path) -> None:
    """Brings the folder up to date; a reader sees each file as it was or as it is now."""
    for path in worth(out):
        data = path.read_bytes()
        if len(data) > LARGEST:  # of lines, those that were written last
            data = data[-LARGEST:].partition(b"\n")[2]
        target = carry / path.name
        if target.exists() and target.read_bytes() == data:
            continue
        fresh = carry.with_name(f"{carry.name}.new")  # beside it: a reader of the folder sees none
        fresh.write_bytes(data)
        os.replace(fresh, target)


def worth(out: Path) -> list[Path]:
    """The files to be carried, in order of worth."""
    found = (path for pattern in _WORTH for path in sorted(out.glob(pattern)))
    return [path for path in found if path.is_file()][:MOST]
