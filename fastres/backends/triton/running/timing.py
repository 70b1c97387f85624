"""CUDA graphs of launches, and how long launches take."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from functools import cache, partial

import torch

from fastres.streams import current

Call = Callable[[], None]
REPEATS = 20  # in one graph: what a replay costs by itself is spread over them
_ROUNDS = 7
recording = threading.RLock()  # held while a graph is captured: none may wait for a whole GPU


def recorder(device: torch.device) -> Callable[[Call], Call]:
    """`record_cuda_graph` for work on this GPU."""
    return partial(record_cuda_graph, device=device)


def record_cuda_graph(work: Call, device: torch.device) -> Call:
    """Runs the work once, so that its kernels are compiled, then records it; returns the replay.

    Args:
        work: launches kernels on the GPU's current stream.
        device: the GPU. A stream belongs to one: on another's, PyTorch's own choice after a capture
            there, nothing would be recorded.
    """
    with recording, current(device):  # one capture at a time; other threads may go on launching
        work()
        torch.cuda.current_stream(device).synchronize()
        graph = torch.cuda.CUDAGraph()
        stream = _capture_stream(torch.cuda.current_device())
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
    replay: Call = graph.replay
    return replay


@cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    """One for each GPU, as PyTorch has few of them, which it deals out again and again."""
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


def milliseconds(work: Call, device: torch.device) -> float:
    """The median time of one pass.

    What the passes read may lie in L2, as they run back to back.

    Args:
        work: launches kernels and does nothing else; it is run at least twice.
    """
    timed = stopwatch(work, device)
    rounds = _ROUNDS if device.type == "cuda" else 1
    return statistics.median(timed() for _ in range(rounds))


def stopwatch(work: Call, device: torch.device, passes: int = REPEATS) -> Callable[[], float]:
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
    with current(device):
        replay = record_cuda_graph(lambda: _repeat(work, passes), device)
        replay()

    def timed() -> float:
        with current(device):
            return _round(replay) / passes

    return timed


def _clocked(work: Call) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _repeat(work: Call, passes: int) -> None:
    for _ in range(passes):
        work()


def _round(replay: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
