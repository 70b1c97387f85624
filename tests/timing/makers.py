"""Targets for processes of their own: some well, some not."""

import atexit
import gc
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastres.errors import UnsupportedError
from fastres.timing.processes import Made


def sleeper(seconds: float) -> Made:
    def call(x: Tensor) -> Tensor:
        time.sleep(seconds)
        return 2 * x

    return Made(call, facts={"pid": os.getpid(), "cores": sorted(os.sched_getaffinity(0))})


def wrong() -> Made:
    return Made(lambda x: 3 * x)


def talker() -> Made:
    print("this is printed", flush=True)
    return Made(lambda x: x, more={"add": lambda x, y: float(x.sum()) + y})


def leaver(path: Path) -> Made:
    """As it leaves, it writes down how many objects are no longer looked at."""
    atexit.register(lambda: path.write_text(str(gc.get_freeze_count())))
    return Made(lambda x: x)


def refused() -> Made:
    raise UnsupportedError("not on a Monday")


def broken() -> Made:
    raise RuntimeError("first line\nit broke")


def no_tensor() -> Made:
    return Made(lambda x: {"logits": x})


def mortal(calls: int) -> Made:
    """Its process ends at that call."""
    left = [calls]

    def call(x: Tensor) -> Any:
        left[0] -= 1
        if left[0] == 0:
            print("about to end", flush=True)
            os._exit(7)
        time.sleep(1e-3)
        return 2 * x

    return Made(call)


def up_to(images: int) -> Made:
    """Has no memory for more."""

    def call(x: Tensor) -> Tensor:
        if len(x) > images:
            raise MemoryError("out of memory")
        return 2 * x

    return Made(call)


def slowly_made(seconds: float) -> Made:
    began = time.monotonic()
    time.sleep(seconds)
    return Made(lambda x: 2 * x, facts={"span": (began, time.monotonic())})


def parent(seconds: float) -> Made:
    """Has a child."""
    child = subprocess.Popen(["sleep", str(seconds)])
    return Made(lambda x: x, facts={"child": child.pid})


def hung() -> Made:
    time.sleep(60)
    return Made(lambda x: x)


def hung_later(path: Path) -> Made:
    """Is made only once."""
    if path.exists():
        time.sleep(60)
    path.touch()
    return sleeper(0.001)


def masked() -> Made:
    blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return Made(lambda x: x, facts={"blocked": blocked})


def torch_threads() -> Made:
    return Made(lambda x: torch.full((1,), float(torch.get_num_threads())))
