"""What every peer is given: the network, how it is to run, and a batch of the shape to expect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastres.options import Precision

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """The network in eval mode, on the example's device.

    Args:
        example: [N, C, H, W] float32.
        images: what to calibrate with for int8, of the example's kind; None where there is none.
    """

    model: nn.Module
    precision: Precision
    threads: int
    example: Tensor
    images: Tensor | None = None


def by_shape(specialise: Callable[[Tensor], Run]) -> Run:
    """A runner for every input shape, made when the shape is first seen."""
    runs: dict[torch.Size, Run] = {}

    def run(x: Tensor) -> Tensor:
        if x.shape not in runs:
            runs[x.shape] = specialise(x)
        return runs[x.shape](x)

    return run
