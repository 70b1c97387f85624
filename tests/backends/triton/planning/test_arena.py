"""Memory of a plan: nothing that lives at the same time overlaps, and little is wasted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastres.backends.triton.planning.arena import ALIGNMENT, Lifetime, place

LIFETIMES = st.lists(
    st.tuples(st.integers(1, 5000), st.integers(0, 30), st.integers(0, 12)), max_size=25
).map(lambda rows: [Lifetime(f"v{i}", s, a, a + n) for i, (s, a, n) in enumerate(rows)])


@given(LIFETIMES)
def test_values_alive_together_do_not_overlap(lifetimes: list[Lifetime]) -> None:
    offsets, total = place(lifetimes)
    assert set(offsets) == {v.name for v in lifetimes}
    for i, a in enumerate(lifetimes):
        assert offsets[a.name] % ALIGNMENT == 0 and offsets[a.name] + a.size <= total
        for b in lifetimes[i + 1 :]:
            if a.meets(b):
                start, end = offsets[a.name], offsets[a.name] + a.size
                assert end <= offsets[b.name] or offsets[b.name] + b.size <= start


def test_a_chain_needs_two_buffers() -> None:
    chain = [Lifetime(f"v{i}", 1024, i, i + 1) for i in range(20)]
    assert place(chain)[1] == 2 * 1024


def test_nothing_to_place() -> None:
    assert place([]) == ({}, 0)
