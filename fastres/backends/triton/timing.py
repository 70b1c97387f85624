"""CUDA graphs of launches, and how long launches take."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

import torch

_REPEATS = 20  # in one graph: what a replay costs by itself is spread over them
_ROUNDS = 7
_recording = threading.Lock()


def record_cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
    """Runs the work once, so that its kernels are compiled, then records it; returns the replay."""
    with _recording:  # one capture at a time; other threads may go on launching
        work()
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
    replay: Callable[[], None] = graph.replay
    return replay


def milliseconds(work: Callable[[], None], device: torch.device) -> float:
    """The median time of one pass.

    On a GPU the passes run back to back, so that a launch does not wait for Python; what they read
    may then lie in L2.

    Args:
        work: launches kernels and does nothing else; it is run at least twice.
    """
    if device.type != "cuda":
        work()
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    with torch.cuda.device(device):
        replay = record_cuda_graph(lambda: _repeat(work))
        replay()
        return statistics.median(_round(replay) / _REPEATS for _ in range(_ROUNDS))


def _repeat(work: Callable[[], None]) -> None:
    for _ in range(_REPEATS):
        work()


def _round(replay: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
