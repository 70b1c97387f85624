"""The bounded table of what was made for each input shape."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from fastres.backends.shape_cache import ShapeCache, Shapes


def shapes(n: int) -> Shapes:
    return ((n, 3, 8, 8),)


def test_drops_what_was_used_least_recently() -> None:
    made: list[Shapes] = []
    cache = ShapeCache(lambda s: made.append(s) or s, 2)
    for n in (1, 2, 1, 3, 1, 2):
        assert cache.get(shapes(n)) == shapes(n)
    assert made == [shapes(n) for n in (1, 2, 3, 2)] and len(cache) == 2
    assert cache.latest() == shapes(2)
    cache.clear()
    assert len(cache) == 0


def test_an_entry_is_made_once_however_many_ask() -> None:
    made = 0
    inside = threading.Lock()

    def make(given: Shapes) -> Shapes:
        nonlocal made
        assert inside.acquire(blocking=False), "two at a time"
        time.sleep(0.01)
        made += 1
        inside.release()
        return given

    cache = ShapeCache(make, 4)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(cache.get, [shapes(1 + i % 2) for i in range(32)]))
    assert made == 2
