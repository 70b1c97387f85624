"""Contexts by stream: whose is found again, who waits for whom, and how many there are."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from fastres.backends.context_pool import KEPT, ContextPool

GPU, CPU = torch.device("cuda", 1), torch.device("cpu")


class Context:
    made = 0

    def __init__(self) -> None:
        Context.made += 1
        self.number = Context.made

    def memory(self) -> tuple[torch.Tensor, ...]:
        return (torch.zeros(1), torch.zeros(1))


@pytest.fixture(autouse=True)
def none_made() -> None:
    Context.made = 0


def use(pool: ContextPool[Context], gpus: Any, stream: Any) -> int:
    """The number of the context that a call on this stream gets; its work stays queued there."""
    with gpus.stream(stream), pool.context(Context) as context:
        stream.busy = True
        return context.number


def test_a_stream_finds_its_own_again(gpus: Any) -> None:
    pool: ContextPool[Context] = ContextPool(GPU)
    one, other = gpus.Stream(GPU), gpus.Stream(GPU)
    assert [use(pool, gpus, s) for s in (one, other, one, other, other)] == [1, 2, 1, 2, 2]
    assert gpus.log == []


def test_one_whose_work_has_ended_goes_to_whoever_asks(gpus: Any) -> None:
    pool: ContextPool[Context] = ContextPool(GPU)
    one, other = gpus.Stream(GPU), gpus.Stream(GPU)
    use(pool, gpus, one)
    one.synchronize()
    assert use(pool, gpus, other) == 1 and len(pool) == 1
    assert gpus.log == ["stream 1 waits for stream 0", "kept for stream 1", "kept for stream 1"]
    assert use(pool, gpus, one) == 2  # as it is the other's now, who is at work with it


def test_streams_without_end_get_no_more_than_are_kept(gpus: Any) -> None:
    pool: ContextPool[Context] = ContextPool(GPU)
    found = [use(pool, gpus, gpus.Stream(GPU)) for _ in range(3 * KEPT)]
    assert found == 3 * [*range(1, KEPT + 1)]  # the one put back first, each time
    assert len(pool) == KEPT
    assert gpus.log[0] == f"stream {KEPT} waits for stream 0"


def test_callers_at_once_have_one_each_and_the_surplus_goes(gpus: Any) -> None:
    pool: ContextPool[Context] = ContextPool(GPU)
    with ExitStack() as callers:
        numbers = [callers.enter_context(pool.context(Context)).number for _ in range(9)]
        assert numbers == list(range(1, 10)) and len(pool) == 9
    assert len(pool) == KEPT
    assert gpus.log == ["the end of GPU 1's own is waited for"] * (9 - KEPT)


def test_one_that_cannot_be_made_is_not_counted(gpus: Any) -> None:
    pool: ContextPool[Context] = ContextPool(GPU)

    def no_room() -> Context:
        raise MemoryError

    for _ in range(2 * KEPT):
        with pytest.raises(MemoryError), pool.context(no_room):
            pass
    assert len(pool) == 0 and use(pool, gpus, gpus.Stream(GPU)) == 1


def test_a_call_that_fails_gives_its_context_back() -> None:
    pool: ContextPool[Context] = ContextPool(CPU)
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"), pool.context(Context):
            raise ValueError("wrong")
    assert Context.made == 1 and len(pool) == 1
