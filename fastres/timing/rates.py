"""What this machine can do at most: rates that a roofline is drawn with, measured here.

On the CPU, arithmetic is the best of some large convolutions in the backend that runs ours, and
traffic a copy of an array that no cache holds: layers whose operands stay in a cache can go beyond
it. On a GPU they are the published rates that the kernels' cost model has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fastres.compiler import compile
from fastres.kernels.cost import target_of
from fastres.options import EIGHT_BITS, Precision
from fastres.timing.processes import Made

_PRODUCTS = ((1, 1024, 32), (1, 512, 56), (3, 256, 56))  # filter, channels, height and width
_COPIED = 1 << 28  # bytes: beyond any cache
_TRIES, _SECONDS = 30, 1.0  # the best of so many, or of what this time has room for


@dataclass(frozen=True)
class Rates:
    """Rates in one precision."""

    gflop_per_s: float
    gb_per_s: float

    def least_seconds(self, flop: float, traffic: float) -> float:
        """The roofline: the longer of arithmetic and traffic."""
        return max(flop / self.gflop_per_s, traffic / self.gb_per_s) / 1e9

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def rates(
    precisions: Sequence[Precision], device: torch.device, threads: int
) -> dict[Precision, Rates]:
    """The rates of this machine in each precision."""
    if device.type == "cuda":
        return {precision: _of_gpu(precision, device) for precision in precisions}
    source = torch.zeros(_COPIED // 4)
    sink = torch.empty_like(source)
    traffic = 2 * _COPIED / _fastest(lambda: sink.copy_(source))
    return {
        precision: Rates(
            max(_arithmetic(*product, precision, threads) for product in _PRODUCTS) / 1e9,
            traffic / 1e9,
        )
        for precision in precisions
    }


def _of_gpu(precision: Precision, device: torch.device) -> Rates:
    target = target_of(device)
    itemsize = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}[precision]
    arithmetic = target.product_flops(itemsize, precision != "fp32") * target.sm_count
    return Rates(arithmetic / 1e9, target.dram_bytes / 1e9)


def _arithmetic(
    filter_size: int, channels: int, side: int, precision: Precision, threads: int
) -> float:
    """Floating-point operations a second of one convolution."""
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(channels, channels, filter_size, padding=filter_size // 2, bias=False).eval()
    nn.init.normal_(conv.weight, std=channels**-0.5, generator=generator)
    x = torch.randn(1, channels, side, side, generator=generator)
    more: dict[str, Any] = {"calibration": [x]} if precision in EIGHT_BITS else {}
    engine = compile(conv, x, backend="cpu", precision=precision, threads=threads, **more)
    flop = 2 * side * side * channels * channels * filter_size**2
    return flop / _fastest(lambda: engine(x))


def maker(precisions: list[Precision], device: str, threads: int) -> Made:
    """For a process of its own, pinned like the targets: its facts are the rates."""
    torch.set_num_threads(threads)
    found = rates(precisions, torch.device(device), threads)
    return Made(lambda x: x, facts={p: each.to_dict() for p, each in found.items()})


def _fastest(work: Callable[[], Any]) -> float:
    work()
    seconds: list[float] = []
    while len(seconds) < _TRIES and sum(seconds) < _SECONDS:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
