"""Whether a plan's kernels are dependent launches: reckoned from how short they are.

What these are stands in `fastres.kernels.jit.dependent`.
"""

from __future__ import annotations

from msgspec.structs import replace

from fastres.backends.base import Choice
from fastres.backends.triton.planning.form import SEVERAL
from fastres.backends.triton.planning.plan import Plan
from fastres.kernels.cost import Target

LAUNCH_US = 1.0  # a step inside a CUDA graph: a guess, until a GPU has answered
_WORTH = 0.05  # of the plan's time: for less, nothing is changed


def has_dependent_launch(target: Target) -> bool:
    return target.sm >= 90


def with_overlap(plan: Plan, target: Target, asked: bool | None) -> Plan:
    """The plan with dependent launches where they pay, and the reckoning among its choices.

    Args:
        asked: what the user wants; None for what is reckoned.
    """
    if not has_dependent_launch(target):
        return plan
    kernels = [choice for choice in plan.choices if choice.taken != SEVERAL]
    measured = all(choice.measured for choice in kernels)
    total = sum(one.microseconds if measured else one.estimated for one in kernels)
    saved = LAUNCH_US * len(plan.steps)
    dependent = saved >= _WORTH * total if asked is None else asked
    forms = ("launched one after the other", "dependent launches")
    times = (total + saved, total)
    choice = Choice(
        nodes=(),
        taken=forms[dependent],
        microseconds=times[dependent],
        measured=False,
        problem="",
        others={forms[not dependent]: f"{times[not dependent]:.1f} us"},
        estimated=times[dependent],
    )
    return replace(plan, dependent=dependent, choices=(*plan.choices, choice))
