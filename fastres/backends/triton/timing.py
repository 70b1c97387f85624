"""CUDA graphs of launches, and how long launches take."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import torch

REPEATS = 20  # in one graph: what a replay costs by itself is spread over them
_ROUNDS = 7
recording = threading.RLock()  # held while a graph is captured: none may wait for a whole GPU


def record_cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
    """Runs the work once, so that its kernels are compiled, then records it; returns the replay."""
    with recording:  # one capture at a time; other threads may go on launching
        work()
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
    replay: Callable[[], None] = graph.replay
    return replay


def milliseconds(work: Callable[[], None], device: torch.device) -> float:
    """The median time of one pass.

    What the passes read may lie in L2, as they run back to back.

    Args:
        work: launches kernels and does nothing else; it is run at least twice.
    """
    timed = stopwatch(work, device)
    rounds = _ROUNDS if device.type == "cuda" else 1
    return statistics.median(timed() for _ in range(rounds))


def stopwatch(
    work: Callable[[], None], device: torch.device, passes: int = REPEATS
) -> Callable[[], float]:
    """Runs the work, so that its kernels are compiled; what it returns times it from then on.

    On a GPU the passes run back to back, so that a launch does not wait for Python.

    Args:
        work: one pass: launches kernels and does nothing else.
        passes: on a GPU, how many are recorded, and run for each time.

    Returns:
        A function that gives the milliseconds of one pass.
    """
    if device.type != "cuda":
        work()
        return lambda: _clocked(work)
    with torch.cuda.device(device):
        replay = record_cuda_graph(lambda: _repeat(work, passes))
        replay()

    def timed() -> float:
        with torch.cuda.device(device):
            return _round(replay) / passes

    return timed


def _clocked(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _repeat(work: Callable[[], None], passes: int) -> None:
    for _ in range(passes):
        work()


def _round(replay: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
