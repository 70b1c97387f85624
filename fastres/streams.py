"""Calling an engine from several threads on a GPU, each on a CUDA stream of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree

Call = Callable[..., Any]


class OnStreams:
    """Copies inputs to the device, computes and hands over, while other threads do the same.

    Args:
        call: an engine on `device`.
        device: a CUDA device.
    """

    def __init__(self, call: Call, device: torch.device) -> None:
        self._call = call
        self._device = device
        self._own = threading.local()

    def submission(self, inputs: tuple[Any, ...]) -> Call:
        """The work on one batch, for another thread; the caller's stream may still be making it."""
        caller = torch.cuda.current_stream(self._device)
        ready = caller.record_event()
        return lambda: self._run(inputs, caller, ready)

    def _run(
        self, inputs: tuple[Any, ...], caller: torch.cuda.Stream, ready: torch.cuda.Event
    ) -> Any:
        stream = self._stream()
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            result = self._call(*(self._brought(x) for x in inputs))
        stream.synchronize()
        for tensor in pytree.tree_leaves(result):
            if tensor is not None:  # its memory is not given out before the caller is done with it
                tensor.record_stream(caller)
        return result

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = self._own.stream
        return stream

    def _brought(self, given: Any) -> Any:
        if isinstance(given, torch.Tensor) and given.device.type == "cpu":
            return given.to(self._device, non_blocking=True)
        return given  # for the engine to check
