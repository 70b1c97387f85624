"""Which sections a run has, in which order, and how much of its time each may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """One section of a run.

    Args:
        seconds: at most; what ends early leaves its time to the next. None takes what is left.
        nets, batch_sizes, precisions: in place of the usual ones.
        groups: of questions, those whose names begin so; all if empty.
    """

    section: str
    seconds: float | None
    nets: Sequence[str] = ()
    batch_sizes: Sequence[int] = ()
    precisions: Sequence[str] = ()
    groups: Sequence[str] = ()


@dataclass(frozen=True)
class Plan:
    """A run's sections, and its seconds in all."""

    sections: Sequence[Asked]
    budget: float


# what a GPU that has never run this is asked first: whether it is right, and where the time goes
FIRST = Plan(
    (
        Asked("facts", 15),
        Asked("compile", 30, ("resnet50",), (256, 1), ("fp16", "int8")),
        Asked("families", 30),
        Asked("networks", 75, ("resnet50",), (256,)),
        Asked("questions", 35, groups=("l2", "launch", "layout")),
        Asked("tuning", None, batch_sizes=(256,), precisions=("fp16",)),
    ),
    budget=240,
)
# then with tuned tiles beside PyTorch's own
SECOND = Plan(
    (
        Asked("tuning", 60, batch_sizes=(1,), precisions=("fp16",)),
        Asked("tuning", 60, batch_sizes=(256,), precisions=("int8",)),
        Asked("tests", 110),
        Asked("speed", None, batch_sizes=(256, 32, 1)),
    ),
    budget=420,
)
EVERYTHING = Plan(
    (
        Asked("facts", 15),
        Asked("compile", 120),
        Asked("families", 45),
        Asked("parity", 80),
        Asked("tests", 90),
        Asked("stem", 25),
        Asked("tuning", 90),
        Asked("questions", 60),
        Asked("kernels", 60),
        Asked("speed", 200),
        Asked("networks", 90, ("resnet50",), (256,)),
        Asked("peers", 240),
        Asked("power", 60),
        Asked("profile", 40),
        Asked("tensorrt", 90),
        Asked("report", 20),
    ),
    budget=520,
)
PLANS = {"first": FIRST, "second": SECOND, "all": EVERYTHING}
