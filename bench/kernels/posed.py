"""Calls with their operands: random ones, poisoned outputs, and what tells a wrong result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastres.kernels.aot import compile_kernel, key_of
from fastres.kernels.cost import Target
from fastres.kernels.launch import Launch
from fastres.tolerances import errors


class Call(Protocol):
    """A launch of ours, or a call of PyTorch's."""

    def run(self) -> None: ...

    def tensors(self) -> Iterable[Tensor]: ...


@dataclass(frozen=True)
class Posed:
    """A case with operands.

    Args:
        calls: one pass, in order; any number of passes may be run.
        wrong: what is wrong with the result of a pass; None if nothing is.
        tiles: how the calls cut their work, where that was not fixed before.
    """

    calls: Sequence[Call]
    wrong: Callable[[], str | None]
    tiles: str = ""


def compiled(pose: Callable[[torch.device], Posed], target: Target) -> int:
    """Compiles the kernels of what is posed into Triton's cache; needs no GPU.

    Returns:
        How many kernels compiled; of those that do not, the case itself will say why.
    """
    try:
        calls = pose(torch.device("meta")).calls
        kernels = {key_of(call): call for call in calls if isinstance(call, Launch)}
        for launch in kernels.values():
            compile_kernel(launch, target.sm)
    except Exception:  # of Triton or its compiler: they raise many kinds
        return 0
    return len(kernels)


def normal(
    device: torch.device, *sizes: int, dtype: torch.dtype = torch.float16, scale: float = 1.0
) -> Tensor:
    """Random operands: normal values, or for int8 all of -127 to 127 alike; nothing on "meta"."""
    if device.type == "meta":
        return torch.empty(sizes, dtype=dtype, device=device)
    if dtype == torch.int8:
        return torch.randint(-127, 128, sizes, dtype=dtype, device=device)
    return (scale * torch.randn(sizes, device=device)).to(dtype)


def poisoned(device: torch.device, *sizes: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """An output full of NaN; of -128, which `normal` does not give, where there is none."""
    value = float("nan") if dtype.is_floating_point else -128
    return torch.full(sizes, value, dtype=dtype, device=device)


def difference(found: Tensor, exact: Tensor, tolerance: float) -> str | None:
    """What tells a result from the float64 one by an RMS error above the tolerance."""
    distance = errors(found, exact)
    return None if distance.rms <= tolerance else f"wrong: {distance}"
