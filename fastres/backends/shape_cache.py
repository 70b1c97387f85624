"""A bounded, thread-safe table of what was made for each input shape."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from fastres.options import Sizes

T = TypeVar("T")
Shapes = tuple[Sizes, ...]


class ShapeCache(Generic[T]):
    """Keeps the `limit` entries used last; the others are dropped and made again on demand.

    Args:
        limit: how many entries to keep.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[Shapes, T] = OrderedDict()
        self._lock = threading.Lock()  # of the table, held for moments
        self._making = threading.Lock()
        self._last: tuple[Shapes, T] | None = None  # for the usual case, without the lock

    def get(self, shapes: Shapes, make: Callable[[Shapes], T]) -> T:
        """The entry of these input shapes.

        Args:
            make: makes it; never called twice at a time, and meanwhile others get what is there. It
                is not kept: what an owner made goes with him, at once.
        """
        last = self._last
        if last is not None and last[0] == shapes:
            return last[1]
        entry = self._find(shapes)
        if entry is None:
            with self._making:
                entry = self._find(shapes)  # another thread may have made it meanwhile
                if entry is None:
                    entry = make(shapes)
                    self._keep(shapes, entry)
        self._last = shapes, entry
        return entry

    def _find(self, shapes: Shapes) -> T | None:
        with self._lock:
            if shapes in self._entries:
                self._entries.move_to_end(shapes)
            return self._entries.get(shapes)

    def _keep(self, shapes: Shapes, entry: T) -> None:
        with self._lock:
            self._entries[shapes] = entry
            if len(self._entries) > self._limit:
                self._entries.popitem(last=False)

    def latest(self) -> T:
        """The entry used last."""
        with self._lock:
            return next(reversed(self._entries.values()))

    def entries(self) -> list[T]:
        """All that is kept, the one used last at the end."""
        with self._lock:
            return list(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)
