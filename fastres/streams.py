"""GPUs and their CUDA streams: which one is current, and calls from several threads at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree

Call = Callable[..., Any]


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the calling thread's current one for a while; nothing for other devices.

    Streams are taken from the current GPU by whoever names none: CUDA graphs, events, TensorRT.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class OnStreams:
    """Copies inputs to the device, computes and hands over, while other threads do the same.

    It makes as many streams as threads ever worked at once, and keeps them: what an engine keeps
    for a stream is found again.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._idle: deque[torch.cuda.Stream] = deque()

    def submission(self, call: Call, inputs: tuple[Any, ...]) -> Call:
        """The work on one batch, for another thread; the caller's stream may still be making it.

        Args:
            call: an engine on the device.
        """
        caller = torch.cuda.current_stream(self._device)
        ready = caller.record_event()
        return lambda: self._run(call, inputs, caller, ready)

    def _run(
        self,
        call: Call,
        inputs: tuple[Any, ...],
        caller: torch.cuda.Stream,
        ready: torch.cuda.Event,
    ) -> Any:
        stream = self._stream()
        try:
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                result = call(*(self._brought(x) for x in inputs))
            stream.synchronize()
        finally:
            self._idle.append(stream)
        for tensor in pytree.tree_leaves(result):
            if tensor is not None:  # its memory is not given out before the caller is done with it
                tensor.record_stream(caller)
        return result

    def _stream(self) -> torch.cuda.Stream:
        """The one put back last, whose contexts are warm; a new one where all are at work."""
        try:
            return self._idle.pop()
        except IndexError:
            return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def _brought(self, given: Any) -> Any:
        if isinstance(given, torch.Tensor) and given.device.type == "cpu":
            return given.to(self._device, non_blocking=True)
        return given  # for the engine to check
