"""GPUs for tests that have none: which one is current, streams, events, recording, as in PyTorch.

Memory is the CPU's, and a kernel is a function that runs when it is launched, unless the stream is
recorded: then it runs when the graph is replayed, and only then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastres.backends.triton.running import timing

Kernel = Callable[[], None]
ATTRIBUTES = (
    "CUDAGraph",
    "Event",
    "Stream",
    "current_device",
    "current_stream",
    "device",
    "graph",
    "stream",
    "synchronize",
)


class Gpus:
    """Several GPUs; `log` has what was asked of their streams.

    `torch.cuda`'s names are its attributes; see `ATTRIBUTES`.
    """

    def __init__(self) -> None:
        self.now = 0
        self.log: list[str] = []
        self.streams: list[Any] = []  # those made, but for the GPUs' own
        self._current: dict[int, Any] = {}
        gpus = self

        class Stream:
            def __init__(self, device: Any = None, name: str | None = None) -> None:
                self.device = torch.device("cuda", gpus.index(device))
                self.name = name or f"stream {len(gpus.streams)}"
                self.cuda_stream = id(self)
                self.busy = False  # with what was launched on it
                self.recorded: list[Kernel] | None = None
                if name is None:
                    gpus.streams.append(self)

            def wait_event(self, event: Event) -> None:
                gpus.log.append(f"{self.name} waits for {event.stream.name}")

            def synchronize(self) -> None:
                self.busy = False

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.stream: Any = None

            def record(self, stream: Any = None) -> None:
                self.stream = stream or gpus.current_stream()

            def query(self) -> bool:
                return not self.stream.busy

            def synchronize(self) -> None:
                gpus.log.append(f"the end of {self.stream.name} is waited for")

            def elapsed_time(self, other: Event) -> float:
                return 1.0

        class CUDAGraph:
            def __init__(self) -> None:
                self.kernels: list[Kernel] = []

            def replay(self) -> None:
                for kernel in self.kernels:
                    kernel()

        class device:
            def __init__(self, device: Any) -> None:
                self.index = gpus.index(device)

            def __enter__(self) -> None:
                self.before, gpus.now = gpus.now, self.index

            def __exit__(self, *error: object) -> None:
                gpus.now = self.before

        class stream:
            def __init__(self, stream: Any) -> None:
                self.stream = stream

            def __enter__(self) -> None:
                self.gpu, self.before = gpus.now, gpus.current_stream(self.stream.device)
                gpus.now = self.stream.device.index
                gpus._current[gpus.now] = self.stream

            def __exit__(self, *error: object) -> None:
                gpus._current[self.stream.device.index] = self.before
                gpus.now = self.gpu

        class graph:
            default_capture_stream: Any = None  # one for all GPUs: of whichever was current first

            def __init__(self, graph: CUDAGraph, stream: Any = None, **more: object) -> None:
                if stream is None and type(self).default_capture_stream is None:
                    type(self).default_capture_stream = Stream()
                self.graph = graph
                self.stream = stream or type(self).default_capture_stream
                self.context = gpus.stream(self.stream)

            def __enter__(self) -> None:
                self.context.__enter__()
                self.stream.recorded = self.graph.kernels

            def __exit__(self, *error: object) -> None:
                self.stream.recorded = None
                self.context.__exit__()

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph
        self.device, self.stream, self.graph = device, stream, graph

    def index(self, device: Any) -> int:
        index = device.index if isinstance(device, torch.device) else device
        return self.now if index is None else int(index)

    def current_device(self) -> int:
        return self.now

    def current_stream(self, device: Any = None) -> Any:
        index = self.index(device)
        own = self._current.get(index)
        return own or self._current.setdefault(index, self.Stream(index, f"GPU {index}'s own"))

    def synchronize(self, device: Any = None) -> None:
        self.log.append(f"GPU {self.index(device)} is waited for")

    def launch(self, kernel: Kernel, device: torch.device) -> None:
        """As Triton's launcher and the driver do: on the stream that is current on this GPU."""
        stream = self.current_stream(device)
        if stream.recorded is None:
            kernel()
        else:
            stream.recorded.append(kernel)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    """In the place of those that `torch.cuda` knows."""
    found = Gpus()
    for name in ATTRIBUTES:
        monkeypatch.setattr(torch.cuda, name, getattr(found, name))
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda x, s: found.log.append(f"kept for {s.name}")
    )
    timing._capture_stream.cache_clear()
    yield found
    timing._capture_stream.cache_clear()
