"""When two results count as equal: the one place that holds numeric tolerances.

The error of a candidate against the float64 oracle must stay within

    largest(candidate) <= max(2 * largest(PyTorch in the candidate's precision), FLOOR[precision])
    rms(candidate) <= max(2 * rms(PyTorch in the candidate's precision), RMS_FLOOR[precision])

both relative to the oracle's RMS. First come shape and the pattern of NaN and infinities. Floors
are there because PyTorch's own error can be small by luck, or by another order of summation; each
stands with the measurement behind it, and none is changed without a new one.

Measured on two Xeon cores with AVX-512 and AMX, torch 2.15, OpenVINO 2026.4, on settled ResNet-18
and -50 (64 and 224 pixels), CIFAR-20 and -110 and a pre-activation net of 20 layers, batches of 1
to 4 photographs, against float64. Largest / RMS error of the logits, PyTorch and the CPU backend,
in fp32 from before it had `fastres.graph.passes.halve_sums`:

                     fp32 PyTorch   fp32 CPU       bf16 PyTorch   bf16 CPU
    ResNet-18 at 224 2.3e-6/5.5e-7  4.9e-6/9.8e-7  3.8e-2/1.1e-2  2.8e-2/8.0e-3
    ResNet-50 at 224 2.8e-5/6.3e-6  2.9e-5/7.4e-6  3.3e-1/7.4e-2  2.7e-1/6.5e-2
    CIFAR-20         1.1e-6/3.8e-7  9.6e-7/3.5e-7  1.5e-2/6.5e-3  1.8e-2/5.4e-3
    CIFAR-110        2.3e-6/7.8e-7  1.9e-6/7.6e-7  4.9e-2/1.6e-2  3.8e-2/1.5e-2
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

FLOOR: dict[torch.dtype, float] = {
    # PyTorch is the oracle itself here: a ResNet-50 whose BatchNorms are folded differs by 2.9e-13
    torch.float64: 1e-12,
    # OpenVINO sums a convolution's products in one chain: up to 1.7e-5 for one layer (PyTorch
    # 1.6e-6) and, where it is past twice PyTorch's, up to 4.1e-5 for a value inside a network
    torch.float32: 5e-5,
    # one rounding of normal values, after a ReLU: 2.5e-3 and 2.1e-2; values beyond 8 RMS, which
    # activations do reach (3.4e-2 for one bf16 convolution, in PyTorch too), take twice that
    torch.float16: 4e-3,
    torch.bfloat16: 3.2e-2,
}
RMS_FLOOR: dict[torch.dtype, float] = {
    torch.float64: 2e-13,  # the same ResNet-50: 6.2e-14
    # 4608 products (3x3, 512 channels) in a single chain: 1.2e-6 (PyTorch in blocks: 3.8e-7);
    # one convolution of OpenVINO: up to 8.6e-7
    torch.float32: 2e-6,
    torch.float16: 2.5e-4,  # one rounding: 2.1e-4
    torch.bfloat16: 2e-3,  # one rounding: 1.7e-3
}
# RMS error of sums of fp8 products. 4608 of one sign in a model of sm_90's tensor cores
# (tests/kernels/test_fp8_sums.py): 8.2e-2 where they add them all, 2.1e-3 with 256 of them at a
# time, 6.4e-4 with 128; of both signs 1.2e-3, 2.3e-4 and 1.6e-4
FP8_SUM_RMS = 4e-3
_NAN = float("nan")


@dataclass(frozen=True)
class Errors:
    """Distance of a result from the oracle, relative to the oracle's RMS; nan if not comparable."""

    largest: float
    rms: float
    reason: str = ""

    def within(self, baseline: Errors, dtype: torch.dtype, slack: float = 2.0) -> bool:
        """Whether the tolerance policy holds, given PyTorch's own error in that dtype."""
        bound = allowed(baseline, dtype, slack)
        return not self.reason and self.largest <= bound.largest and self.rms <= bound.rms


def allowed(baseline: Errors, dtype: torch.dtype, slack: float = 2.0) -> Errors:
    """The bound that the policy sets: the floors alone where PyTorch's own result is no number."""
    if baseline.reason:
        return Errors(FLOOR[dtype], RMS_FLOOR[dtype])
    largest, rms = slack * baseline.largest, slack * baseline.rms
    return Errors(max(largest, FLOOR[dtype]), max(rms, RMS_FLOOR[dtype]))


def errors(candidate: torch.Tensor, oracle: torch.Tensor) -> Errors:
    """Compares shape, then the NaN and infinity pattern, then values.

    Args:
        candidate: any floating-point dtype.
        oracle: float64, of the same shape.
    """
    distance = Distance()
    distance.add(candidate, oracle)
    return distance.errors


class Distance:
    """A candidate's results against the oracle's, over any number of batches, in little memory.

    With c the candidate's values and o the oracle's: largest = max|c - o| / rms(o) and
    rms = rms(c - o) / rms(o). Positions where both are NaN, or the same infinity, are left out.

    Args:
        atol, rtol: if either is given, `outside` counts the elements with
            |c - o| > atol + rtol * |o|.
    """

    def __init__(self, atol: float | None = None, rtol: float | None = None) -> None:
        self.reason = ""
        self.count = 0
        self.images = 0
        self.outside = 0
        self.max_abs = 0.0
        self.max_relative = 0.0
        self._counts = atol is not None or rtol is not None
        self._atol, self._rtol = atol or 0.0, rtol or 0.0
        self._noise = self._signal = self._power = self._dot = 0.0
        self._sum: torch.Tensor | None = None  # the oracle's, over images
        self._agreeing: int | None = None

    def add(self, candidate: torch.Tensor, oracle: torch.Tensor) -> None:
        """Takes in one batch; after a mismatch of shapes or of NaN the rest is ignored.

        Args:
            candidate: any dtype.
            oracle: [N, ...] float64, of the same shape.
        """
        if self.reason or oracle.numel() == 0 == candidate.numel():
            return
        if candidate.shape != oracle.shape:
            self.reason = f"shape {list(candidate.shape)}, expected {list(oracle.shape)}"
            return
        got, want = candidate.detach().cpu().double(), oracle.detach().cpu().double()
        self._add_ranks(got, want)
        finite = want.numel()
        if not math.isfinite((got - want).sum().item()):  # no pass over either where all is finite
            strange = ~torch.isfinite(want)
            self.reason = _pattern(got, want, strange)
            if self.reason:
                return
            finite -= int(strange.sum())
            got, want = got.masked_fill(strange, 0.0), want.masked_fill(strange, 0.0)
        images = len(want) if want.dim() else 1
        self._add_sum(want, images)
        self.images += images
        self.count += finite
        got, want = got.flatten(), want.flatten()
        difference, size = (got - want).abs_(), want.abs()
        if self._counts:
            self.outside += int((difference > self._atol + self._rtol * size).sum())
        relative = difference / size.masked_fill_(size == 0, math.inf)
        self.max_abs = max(self.max_abs, difference.max().item())
        self.max_relative = max(self.max_relative, relative.max().item())
        self._noise += difference.dot(difference).item()
        self._signal += want.dot(want).item()
        self._power += got.dot(got).item()
        self._dot += got.dot(want).item()

    @property
    def errors(self) -> Errors:
        """Largest and RMS error over the oracle's RMS; absolute where the oracle is zero."""
        if self.reason:
            return Errors(_NAN, _NAN, self.reason)
        if self.images and not self.count:
            return Errors(_NAN, _NAN, "nothing was compared: no value of the oracle is finite")
        if self.count == 0:
            return Errors(0.0, 0.0)
        scale = math.sqrt(self._signal / self.count) or 1.0
        return Errors(self.max_abs / scale, math.sqrt(self._noise / self.count) / scale)

    @property
    def cosine(self) -> float:
        """<c, o> / (|c| |o|); nan where one of them is zero."""
        norms = math.sqrt(self._power) * math.sqrt(self._signal)
        return self._dot / norms if norms and not self.reason else _NAN

    @property
    def spread(self) -> float:
        """|o - mean(o)| / |o|, the mean over images: how much of a result tells images apart.

        nan for a single image, or where images of different sizes have no common mean.
        """
        if self._sum is None or self.images < 2 or not self._signal or self.reason:
            return _NAN
        constant = self._sum.square().sum().item() / self.images / self._signal
        return math.sqrt(max(0.0, 1.0 - constant))

    @property
    def sqnr_db(self) -> float:
        """10 log10(|o - mean(o)|^2 / |c - o|^2); uncentred where `spread` is nan."""
        if self.reason or not self._signal:
            return _NAN
        signal = self._signal * (1.0 if math.isnan(self.spread) else self.spread**2)
        if not self._noise or not signal:
            return math.inf if signal else -math.inf
        return 10 * math.log10(signal / self._noise)

    @property
    def top1(self) -> float:
        """Share of rows with the same largest element, for [N, classes] results; else nan."""
        return _NAN if self._agreeing is None or self.reason else self._agreeing / self.images

    def _add_sum(self, want: torch.Tensor, images: int) -> None:
        total = want.sum(0) if want.dim() else want.clone()
        if not self.images:
            self._sum = total
        elif self._sum is not None:
            self._sum = self._sum + total if self._sum.shape == total.shape else None

    def _add_ranks(self, got: torch.Tensor, want: torch.Tensor) -> None:
        if want.dim() == 2 and want.shape[1] > 1:
            agreeing = int((got.argmax(1) == want.argmax(1)).sum())
            self._agreeing = agreeing + (self._agreeing or 0)


def _pattern(got: torch.Tensor, want: torch.Tensor, strange: torch.Tensor) -> str:
    """Empty if NaN and infinities stand at the same places in both."""
    if not torch.equal(strange, ~torch.isfinite(got)):
        bad, expected = int((~torch.isfinite(got)).sum()), int(strange.sum())
        return f"{bad} of {got.numel()} values are NaN or infinite, expected {expected}"
    if not torch.equal(torch.nan_to_num(got[strange]), torch.nan_to_num(want[strange])):
        return "NaN and infinity stand in each other's place"
    return ""
