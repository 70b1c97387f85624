"""fastres.graph.names: no two nodes of one name, and none that a constant has."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastres.graph.names import Namer


def test_numbers_from_the_second_on() -> None:
    namer = Namer()
    assert [namer.name("relu") for _ in range(3)] == ["relu", "relu_1", "relu_2"]
    assert namer.name("conv") == "conv"


def test_a_number_that_is_taken() -> None:
    namer = Namer()
    assert [namer.name(n) for n in ("a", "a_1", "a", "a", "a_1")] == [
        "a",
        "a_1",
        "a_1_1",
        "a_2",
        "a_1_2",
    ]


def test_names_of_constants() -> None:
    namer = Namer(("mean", "mean_1"))
    assert [namer.name("mean") for _ in range(2)] == ["mean_1_1", "mean_2"]


@given(st.lists(st.sampled_from(["a", "a_1", "a_2", "a_1_1", "b"])))
def test_are_never_given_twice(wanted: list[str]) -> None:
    namer = Namer(("b",))
    given_names = [namer.name(name) for name in wanted]
    assert len(set(given_names)) == len(given_names) and "b" not in given_names
