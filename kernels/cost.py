"""What a kernel call costs and what a GPU offers: numbers for tile choice and roofline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # plans are read where there is no PyTorch
    import torch


@dataclass(frozen=True)
class Cost:
    """Work of one kernel call.

    Args:
        flops: floating-point operations, a multiply-add counted as two.
        bytes: compulsory traffic to device memory: every operand once.
    """

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Work:
    """What a step asks of a GPU, cut into blocks as it is.

    Args:
        flops: of its products, what blocks multiply beyond the tensor included.
        bytes: compulsory traffic to device memory: every operand once.
        l2: bytes between the L2 cache and the SMs: what each block loads and stores.
        launches: kernels, one after the other.
    """

    flops: float
    bytes: float
    l2: float
    launches: int = 1

    def arithmetic_seconds(self, target: Target, itemsize: int, tensor_cores: bool = True) -> float:
        """If nothing but products counted; arguments as of `Target.product_flops`."""
        return self.flops / (target.product_flops(itemsize, tensor_cores) * target.sm_count)

    def memory_seconds(self, target: Target) -> float:
        """If nothing but device memory counted."""
        return self.bytes / target.dram_bytes

    def l2_seconds(self, target: Target) -> float:
        """If nothing but the L2 cache counted."""
        return self.l2 / (target.l2_bytes * target.sm_count)


@dataclass(frozen=True)
class _Architecture:
    """Limits and rates of one streaming multiprocessor (SM).

    Args:
        shared_bytes: largest shared memory one block may ask for.
        fp16_flops: dense fp16 tensor-core rate with fp32 accumulation, per second.
        byte_flops: likewise of 8-bit operands: int8, and fp8 from sm_89 on.
        dram_bytes: this SM's part of the device memory's rate, per second.
        l2_bytes: this SM's part of the L2 cache's rate, per second.
    """

    shared_bytes: int
    fp16_flops: float
    byte_flops: float
    dram_bytes: float
    l2_bytes: float


# Shared memory: CUDA programming guide, compute capabilities. Rates: what is published for one
# card of the kind (sm_90: what large matrix products and copies are reported to reach, not the
# peak; of 8-bit products the same share of the 1,979e12 on the data sheet), divided by its SMs
# (A100, A10, L40S, H200, B200, RTX 5090 in this order); the L2 rates are guesses, 1.3 to 5 times
# the device memory. On sm_100 the 8-bit rate is fp8's: for int8, Triton 3.6 takes an older
# instruction there. They rank tiles and predict no times.
_ARCHITECTURES = {
    80: _Architecture(166_912, 312e12 / 108, 624e12 / 108, 2.0e12 / 108, 5.0e12 / 108),
    86: _Architecture(101_376, 125e12 / 72, 250e12 / 72, 0.6e12 / 72, 2.0e12 / 72),
    89: _Architecture(101_376, 362e12 / 142, 733e12 / 142, 0.86e12 / 142, 4.0e12 / 142),
    90: _Architecture(232_448, 800e12 / 132, 1600e12 / 132, 4.3e12 / 132, 5.6e12 / 132),
    100: _Architecture(232_448, 2250e12 / 148, 4500e12 / 148, 8.0e12 / 148, 15e12 / 148),
    120: _Architecture(101_376, 210e12 / 170, 419e12 / 170, 1.8e12 / 170, 6.0e12 / 170),
}
_SM_COUNTS = {80: 108, 86: 72, 89: 142, 90: 132, 100: 148, 120: 170}


@dataclass(frozen=True)
class Target:
    """The GPU a kernel is shaped for.

    Args:
        sm: compute capability times ten, 90 for Hopper.
        sm_count: number of SMs on the card.

    Raises:
        ValueError: below sm_80, whose instructions the kernels need.
    """

    sm: int
    sm_count: int

    def __post_init__(self) -> None:
        if self.sm < 80:
            raise ValueError(f"sm_{self.sm} is not supported: the kernels need sm_80 or newer")
        if self.sm_count < 1:
            raise ValueError(f"sm_count is {self.sm_count}, expected at least 1")

    @classmethod
    def typical(cls, sm: int) -> Target:
        """The target with the SM count of a data-centre card of that architecture."""
        return cls(sm, _SM_COUNTS[_known(sm)])

    @property
    def shared_bytes(self) -> int:
        """Largest shared memory one block may ask for."""
        return _ARCHITECTURES[_known(self.sm)].shared_bytes

    @property
    def fp16_flops(self) -> float:
        """Dense fp16 tensor-core rate of one SM, per second."""
        return _ARCHITECTURES[_known(self.sm)].fp16_flops

    def product_flops(self, itemsize: int, tensor_cores: bool = True) -> float:
        """Rate of one SM for products of elements of `itemsize` bytes, per second.

        Args:
            tensor_cores: whether they run on them (fp32 in full precision does not).
        """
        if itemsize == 1:
            return _ARCHITECTURES[_known(self.sm)].byte_flops
        return self.fp16_flops * (2 / itemsize if tensor_cores else 1 / 16)

    @property
    def dram_bytes(self) -> float:
        """Device memory rate of the whole card, bytes per second."""
        return _ARCHITECTURES[_known(self.sm)].dram_bytes * self.sm_count

    @property
    def l2_bytes(self) -> float:
        """L2 cache rate of one SM, bytes per second."""
        return _ARCHITECTURES[_known(self.sm)].l2_bytes


def least_seconds(cost: Cost, target: Target, itemsize: int, tensor_cores: bool) -> float:
    """The roofline: the longer of arithmetic and compulsory traffic, at the target's rates.

    Args:
        itemsize: bytes of an operand's element.
        tensor_cores: whether products run on them (fp32 in full precision does not).
    """
    arithmetic = cost.flops / (target.product_flops(itemsize, tensor_cores) * target.sm_count)
    return max(arithmetic, cost.bytes / target.dram_bytes)


def _known(sm: int) -> int:
    """The newest listed architecture not above `sm`: sm_103 counts as sm_100."""
    known = [candidate for candidate in _ARCHITECTURES if candidate <= sm]
    if not known:
        raise ValueError(f"sm_{sm} is not supported: the kernels need sm_80 or newer")
    return max(known)


def target_of(device: torch.device) -> Target:
    """The target a tensor's device stands for; anything but CUDA is shaped as for an H200."""
    if device.type != "cuda":
        return Target.typical(90)
    import torch

    properties = torch.cuda.get_device_properties(device)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)
