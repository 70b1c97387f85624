"""A kernel's time beside what the machine allows: TFLOP/s, GB/s, share of the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastres.backends.triton.planning.overlap import LAUNCH_US
from fastres.kernels.cost import Target
from fastres.kernels.launch import Launch


@dataclass(frozen=True)
class Rates:
    """What one kernel does in its time, measured or calculated.

    Args:
        least_us: the roofline: microseconds that the rates of `fastres.kernels.cost` allow.
        share_of_roofline: that, of the time it takes.
        bound: which rate the roofline is of; "launch" where it is less than a launch takes, by
            the guess of `fastres.backends.triton.planning.overlap`.
    """

    microseconds: float
    tflops: float
    gbs: float
    least_us: float
    share_of_roofline: float
    bound: Literal["arithmetic", "memory", "launch"]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rates(launches: Sequence[Launch], seconds: float, target: Target) -> Rates:
    """The rates of a kernel that takes so long.

    Args:
        launches: its calls. Work and traffic are those of the first; a second one sums the parts
            of a split depth, which is a way of doing the same work and no work of its own.
    """
    first = launches[0]
    assert first.cost is not None, f"{first.kernel} does not tell its cost"
    least, bound = first.least(target)
    return Rates(
        microseconds=1e6 * seconds,
        tflops=first.cost.flops / seconds / 1e12,
        gbs=first.cost.bytes / seconds / 1e9,
        least_us=1e6 * least,
        share_of_roofline=least / seconds,
        bound="launch" if 1e6 * least < LAUNCH_US else bound,
    )
