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

    def make(given: Shapes) -> Shapes:
        made.append(given)
        return given

    cache: ShapeCache[Shapes] = ShapeCache(2)
    for n in (1, 2, 1, 3, 1, 2):
        assert cache.get(shapes(n), make) == shapes(n)
    assert made == [shapes(n) for n in (1, 2, 3, 2)] and len(cache) == 2
    assert cache.latest() == shapes(2)


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

    cache: ShapeCache[Shapes] = ShapeCache(4)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: cache.get(shapes(1 + i % 2), make), range(32)))
    assert made == 2


def test_what_is_there_is_served_while_another_is_made() -> None:
    started, go_on = threading.Event(), threading.Event()

    def make(given: Shapes) -> Shapes:
        if given == shapes(2):
            started.set()
            assert go_on.wait(10)
        return given

    cache: ShapeCache[Shapes] = ShapeCache(4)
    cache.get(shapes(1), make)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(cache.get, shapes(2), make)
        assert started.wait(10)
        assert cache.get(shapes(1), make) == shapes(1) and len(cache) == 1
        go_on.set()
        assert slow.result() == shapes(2)
