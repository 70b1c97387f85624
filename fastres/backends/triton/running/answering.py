"""Whether a GPU still answers: a launch that was refused is told from an error that stays.

After an illegal access, and its like, every call in the process fails, whatever it asks for: what
then looks like a refusal is none. Imports no triton.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastres.backends.triton.running.timing import recording
from fastres.errors import DeviceLost, first_line
from fastres.options import Options

SWITCH = "FASTRES_SYNC_LAUNCHES"  # 1: each launch is waited for by itself, and named before


def switched_on() -> bool:
    """Whether the environment asks for each launch to be waited for and named."""
    return os.environ.get(SWITCH) == "1"


def launched_one_by_one(options: Options) -> bool:
    """Whether an engine waits for each launch: as it was told, else as the environment says."""
    return switched_on() if options.sync_launches is None else options.sync_launches


def check_answers(device: torch.device, last: str) -> None:
    """Waits for everything that was launched on a GPU; other devices are not asked.

    Args:
        last: what ran there last, in words.

    Raises:
        DeviceLost: the GPU reports an error.
    """
    if device.type != "cuda":
        return
    try:
        with recording:
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceLost(
            f"{device} answers no more, last was {last}: {first_line(error)}. Start a new process; "
            f"with {SWITCH}=1 each launch is named and waited for"
        ) from error


@contextmanager
def answering(device: torch.device, name: str, tell: bool = False) -> Iterator[None]:
    """Around launches: they have ended behind it, and what they raise is theirs alone.

    Args:
        device: where they run.
        name: of what is launched.
        tell: whether that is said on stderr before, for one that never ends; the switch does so
            everywhere.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    if tell or switched_on():
        print(f"fastres: {name}", file=sys.stderr, flush=True)
    try:
        yield
    except DeviceLost:  # whoever said so was nearer to it
        raise
    except Exception:
        check_answers(device, name)
        raise
    check_answers(device, name)
