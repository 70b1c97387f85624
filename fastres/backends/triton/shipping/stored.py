"""Plans that travel with a saved engine: written on one machine, read and checked on another.

    compiled_triton_plans.json    target, plans, and what each kernel was compiled to

A plan says where in memory kernels write. None from a file is trusted: it is made anew from the
graph with the choices that the file records, and taken only if it comes out the same. So are the
names and tiles of its kernels; what these were compiled to is told as the file tells it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from fastres.backends.base import KernelInfo
from fastres.backends.parts import MOST_BYTES, read_part
from fastres.backends.triton.planning.plan import Plan
from fastres.errors import ArtifactError
from fastres.options import Sizes

PLANS = "compiled_triton_plans.json"


class Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of compiled_triton_plans.json."""

    target: str
    plans: tuple[Plan, ...]
    kernels: tuple[KernelInfo, ...]


def write_plans(
    target: str, plans: Sequence[Plan], kernels: Sequence[KernelInfo]
) -> dict[str, bytes]:
    """The file, by name.

    Args:
        plans: of which the last are kept, as many as a file may hold: eight of ResNet-1202.
    """
    content = msgspec.json.encode(Stored(target, tuple(plans), tuple(kernels)))
    text = msgspec.json.format(content, indent=1)
    if len(text) > MOST_BYTES and plans:
        return write_plans(target, plans[1:], kernels)
    return {PLANS: text}


def read_plans(files: Mapping[str, bytes]) -> Stored | None:
    """What the file holds; None if there is none.

    Raises:
        ArtifactError: it is damaged, or too large.
    """
    if PLANS not in files:
        return None
    stored = read_part(PLANS, files[PLANS], Stored)
    if len({plan.input_shapes for plan in stored.plans}) < len(stored.plans):
        raise ArtifactError(f"{PLANS} cannot be read: two plans are for the same inputs")
    return stored


def recorded(
    files: Mapping[str, bytes], target: str, library: str | None = None
) -> dict[tuple[Sizes, ...], Plan]:
    """The stored plans for this target, by input shapes; others do not fit it.

    Args:
        library: the vendor's that is here (`vendor.library`); a plan that another one is to run
            steps of is left out.

    Raises:
        ArtifactError: the file is damaged.
    """
    stored = read_plans(files)
    if stored is None or stored.target != target:
        return {}
    fit = (plan for plan in stored.plans if plan.libraries <= {library})
    return {plan.input_shapes: plan for plan in fit}
