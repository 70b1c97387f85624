"""fastres.timing.turns: which calls of a turn count."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from fastres.timing import turns


@pytest.mark.parametrize(("long", "called"), [(1.0, 4), (0.001, 3)], ids=["short", "long"])
def test_the_first_call_counts_only_if_it_is_long(
    long: float, called: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "LONG", long)
    calls: list[int] = []

    def call(x: Tensor) -> None:
        calls.append(len(x))
        time.sleep(0.002)

    seconds = turns.turn(call, torch.zeros(7), 3)
    assert len(seconds) == 3 and min(seconds) >= 0.002
    assert calls == [7] * called
