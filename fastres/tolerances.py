"""When two results count as equal: the one place that holds numeric tolerances.

The error of a candidate against the float64 oracle must stay within

    err(candidate) <= max(2 * err(PyTorch in the candidate's precision), FLOOR[precision])

for the largest error and for the root mean square, both relative to the oracle's RMS. First come
shape and the pattern of NaN and infinities. A floor is there because PyTorch's own error can be
zero by luck on a small tensor; each stands with the measurement behind it, and none is changed
without a new one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FLOOR: dict[torch.dtype, float] = {
    # a few units in the last place of the format, relative to the RMS, for the largest error:
    # values reach about 5 RMS, so half a unit in the last place of such a value is 5 * eps / 2
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


@dataclass(frozen=True)
class Errors:
    """Distance of a result from the oracle, relative to the oracle's RMS; nan if not comparable."""

    largest: float
    rms: float
    reason: str = ""

    def within(self, baseline: Errors, dtype: torch.dtype, slack: float = 2.0) -> bool:
        """Whether the tolerance policy holds, given PyTorch's own error in that dtype."""
        floor = FLOOR[dtype]
        return (
            not self.reason
            and self.largest <= max(slack * baseline.largest, floor)
            and self.rms <= max(slack * baseline.rms, floor)
        )


def errors(candidate: torch.Tensor, oracle: torch.Tensor) -> Errors:
    """Compares shape, then the NaN and infinity pattern, then values.

    Args:
        candidate: any floating-point dtype.
        oracle: float64, of the same shape.
    """
    nan = float("nan")
    if candidate.shape != oracle.shape:
        return Errors(nan, nan, f"shape {list(candidate.shape)}, expected {list(oracle.shape)}")
    if oracle.numel() == 0:
        return Errors(0.0, 0.0)
    got, want = candidate.detach().double().cpu(), oracle.detach().double().cpu()
    strange = ~torch.isfinite(want)
    if not torch.equal(strange, ~torch.isfinite(got)):
        return Errors(nan, nan, _pattern(got, want))
    if strange.any():
        same = torch.equal(torch.nan_to_num(got[strange]), torch.nan_to_num(want[strange]))
        if not same:
            return Errors(nan, nan, "NaN and infinity stand in each other's place")
        got, want = got[~strange], want[~strange]
        if want.numel() == 0:
            return Errors(0.0, 0.0)
    scale = want.square().mean().sqrt().item() or 1.0
    difference = got - want
    return Errors(
        difference.abs().max().item() / scale, difference.square().mean().sqrt().item() / scale
    )


def _pattern(got: torch.Tensor, want: torch.Tensor) -> str:
    bad, expected = int((~torch.isfinite(got)).sum()), int((~torch.isfinite(want)).sum())
    return f"{bad} of {got.numel()} values are NaN or infinite, expected {expected}"
