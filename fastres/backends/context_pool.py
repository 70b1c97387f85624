"""Memory and what is bound to it, for one caller at a time: found again by stream, and bounded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch

KEPT = 4  # contexts: two batches of `Engine.map` in flight, calls beside them, and one to spare


class Context(Protocol):
    """What a pool keeps."""

    def memory(self) -> tuple[torch.Tensor, ...]:
        """All that its work reads and writes: PyTorch may not give it out before that has ended."""


T = TypeVar("T", bound=Context)


class _Idle(Generic[T]):
    """A context that was put back, though its work may still be queued on a stream."""

    def __init__(self, context: T) -> None:
        self.context = context
        self.stream: torch.cuda.Stream | None = None  # none but on a GPU
        self.ended: torch.cuda.Event | None = None

    def has_ended(self) -> bool:
        return self.ended is None or bool(self.ended.query())  # type: ignore[no-untyped-call]

    def put_on(self, stream: torch.cuda.Stream | None) -> None:
        """Lets a stream wait for what another one still does here."""
        if stream is None or self.ended is None or self.stream == stream:
            return
        stream.wait_event(self.ended)
        for tensor in self.context.memory():
            tensor.record_stream(stream)

    def mark(self, stream: torch.cuda.Stream | None) -> None:
        """Notes that all which is queued on the stream now comes before the next use."""
        if stream is not None:
            self.stream = stream
            self.ended = self.ended or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.ended.record(stream)


class ContextPool(Generic[T]):
    """Contexts of one plan.

    Who asks gets the one that ran last on the stream that is current, or else one whose work has
    ended. Where there is none he gets a new one while there are fewer than `kept`, and then the one
    that was put back first, for which his stream waits. There are more only while more callers are
    at work at once.

    Args:
        device: where contexts lie.
        kept: how many are kept.
    """

    def __init__(self, device: torch.device, kept: int = KEPT) -> None:
        self._device = device
        self._kept = kept
        self._idle: list[_Idle[T]] = []  # the one put back last at the end
        self._taken = 0
        self._lock = threading.Lock()

    @contextmanager
    def context(self, make: Callable[[], T]) -> Iterator[T]:
        """A context that nobody else uses meanwhile.

        Args:
            make: a new one. It is not kept here: whoever drops the pool's owner drops all of it.
        """
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.current_stream(self._device) if on_gpu else None
        used = self._take(stream)
        try:
            if used is None:
                used = _Idle(make())
            used.put_on(stream)
            yield used.context
        finally:
            if used is not None:
                used.mark(stream)
            self._put_back(used)

    def __len__(self) -> int:
        return len(self._idle) + self._taken

    def _take(self, stream: torch.cuda.Stream | None) -> _Idle[T] | None:
        with self._lock:
            self._taken += 1
            for fits in (lambda x: x.stream == stream, _Idle.has_ended):
                for place in reversed(range(len(self._idle))):
                    if fits(self._idle[place]):
                        return self._idle.pop(place)
            return self._idle.pop(0) if self._idle and len(self) > self._kept else None

    def _put_back(self, used: _Idle[T] | None) -> None:
        with self._lock:
            self._taken -= 1
            if used is not None:
                self._idle.append(used)
            dropped = self._idle.pop(0) if len(self._idle) > self._kept else None
        if dropped is not None and dropped.ended is not None:
            dropped.ended.synchronize()  # nothing goes while the GPU still works with it
