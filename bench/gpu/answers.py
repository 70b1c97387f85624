"""One question to a GPU: its row, also where the answer is a refusal, or the GPU's end."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.gpu.run import Row
from fastres.backends.triton.running.answering import answering
from fastres.errors import DeviceLost, is_interrupt


def answer(name: str, device: torch.device, work: Callable[[], Row], **known: Any) -> Iterator[Row]:
    """The row of one question, or why it has none.

    A question that breaks the GPU is answered wrong, so that the next run goes on behind it.

    Args:
        work: asks; what it raises is a refusal, as long as the GPU answers.
        known: what else stands in the row.

    Raises:
        DeviceLost: the GPU answers no more: nothing can be asked in this process.
    """
    known = {"name": name, **known}
    try:
        with answering(device, name):
            row = work()
    except DeviceLost as error:
        yield known | {"right": False, "why": str(error)}
        raise
    except Exception as error:  # of Triton, its compiler or the driver: they raise many kinds
        if is_interrupt(error):
            raise
        why = f"{type(error).__name__}: {str(error).strip()[:300]}"
        row = {"refused": why, "trace": traceback.format_exc()[-1000:]}
    yield known | row
