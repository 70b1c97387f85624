"""What a question consists of: cases, and calls of PyTorch's beside ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.kernels.posed import Posed


@dataclass(frozen=True)
class Library:
    """A call of PyTorch's, to be timed beside ours."""

    call: Callable[[], object]
    operands: Sequence[Tensor]

    def run(self) -> None:
        self.call()

    def tensors(self) -> Iterable[Tensor]:
        return self.operands


@dataclass(frozen=True)
class Case:
    """One way of doing what a question is about.

    Args:
        group: the question and the way; the table shows the fastest case of each group.
        setting: tells the cases of a group apart.
        pose: lays out operands on a device; on "meta" the calls can be compiled, and nothing more.
        flops, bytes: of one pass; 0 where they mean nothing.
        rotate: whether passes walk through more memory than L2 holds.
    """

    group: str
    setting: str
    pose: Callable[[torch.device], Posed]
    flops: float = 0.0
    bytes: float = 0.0
    rotate: bool = True

    @property
    def name(self) -> str:
        return f"{self.group}, {self.setting}" if self.setting else self.group
