"""A problem in 8 bits with operands: int8 must be the reference's bit for bit, fp8 to a step."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastres.backends.triton.problems import Problem
from fastres.backends.triton.trial import Trial
from fastres.kernels import reference
from fastres.kernels.chain_tiles import ChainShape
from fastres.kernels.folding import pack_stem_weight, packed_shape
from fastres.kernels.geometry import ConvShape
from fastres.kernels.space_to_depth import space_to_depth
from fastres.options import EIGHT_BITS

_UNWRITTEN = -128  # which no ReLU gives
_STEP = 0.126  # of e4m3, relative: 3 bits behind the point; a sum's own error besides
_SMALL = 2.0**-6  # the smallest e4m3 of full precision


class EightBitTrial(Trial):
    """Random operands, with scales by which sums come to lie within the range of the result."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        super().__init__(problem, device)
        shape = problem.shape
        assert not isinstance(shape, ChainShape)
        depth = 3 * 49 if self._is_stem else shape.r * shape.s * shape.c // shape.groups
        if device.type == "meta":
            scale = torch.empty(shape.k, dtype=torch.float32, device=device)
        else:  # a sum has the deviation 74^2 sqrt(depth) of uniform bytes
            factors = torch.rand(shape.k, generator=self._generator, device=device) + 0.5
            scale = factors * (50 / (74 * 74 * depth**0.5))
        if problem.floating:
            self._outputs = [out.to(torch.float16) for out in self._outputs]
        self._scales = {"scale": scale, "out_scale": 1.0 if problem.floating else 0.75}
        if problem.residual:
            self._scales["residual_scale"] = 0.5

    def poison(self) -> None:
        for out in self._outputs:
            out.fill_(_UNWRITTEN)

    def difference(self) -> str | None:
        (out,) = self._outputs
        if bool((out.float() == _UNWRITTEN).any()):
            return "the output has elements that were not written"
        chosen = self.chosen()
        found, exact = out[chosen].float(), self._exact(chosen).float()
        off = (found - exact).abs()
        if self.problem.precision == "fp8":
            off = off - _STEP * exact.abs().clamp_min(_SMALL)
        wrong = int((off > 0).sum())
        return f"{wrong} values of the output are not the reference's" if wrong else None

    def _make_stem(self, s: ConvShape) -> None:
        self._x = self._random(s.n, 2 * s.p, 2 * s.q, 3)
        self._filters = self._random(s.k, 7, 7, 3)
        self._bias = self._random(s.k, dtype=torch.float32)
        self._outputs = [self._random(*self._stem_pixels(s), s.k)]
        self._matrix = pack_stem_weight(self._filters.permute(0, 3, 1, 2))
        self._folded = self._random(*packed_shape(s.n, 2 * s.p, 2 * s.q))
        if self._generator is not None:
            space_to_depth(self._x.half().permute(0, 3, 1, 2), out=self._folded)

    def _exact(self, chosen: torch.Tensor) -> torch.Tensor:
        shape = self.problem.shape
        assert isinstance(shape, ConvShape)
        residual = None if self._residual is None else self._residual[chosen].permute(0, 3, 1, 2)
        x, weight = (t.double().permute(0, 3, 1, 2) for t in (self._x[chosen], self._filters))
        sizes = ((2, 2), (3, 3)) if self._is_stem else (shape.stride, shape.padding)
        acc = F.conv2d(  # of bytes exact
            x, weight, None, *sizes, *(() if self._is_stem else (shape.dilation, shape.groups))
        )
        column, dtype = (1, -1, 1, 1), self._outputs[0].dtype
        y = reference.finish_int8(
            acc,
            self._scales["scale"].view(column),
            self._bias.view(column),
            residual,
            self._scales.get("residual_scale", 1.0),
            "relu",
            self._scales["out_scale"],
            torch.float32 if dtype.itemsize == 1 else dtype,
        )
        y = reference.saturated(y, dtype) if dtype.itemsize == 1 else y
        if self.problem.kind == "stem and pool":
            y = reference.max_pool(y, (3, 3), (2, 2), (1, 1))
        return y.permute(0, 2, 3, 1)

    def _random(
        self,
        *sizes: int,
        depth: int | None = None,
        dtype: torch.dtype | None = None,
        positive: bool = False,
    ) -> torch.Tensor:
        """Whole numbers, whatever the depth; other types as ever."""
        if dtype is not None or self._generator is None:
            return super()._random(*sizes, dtype=dtype)
        least = 0 if positive else -127
        whole = torch.randint(least, 128, sizes, generator=self._generator, device=self.device)
        return whole.to(self._dtype)


def make_trial(problem: Problem, device: torch.device) -> Trial:
    """The trial of a problem in its precision."""
    return (EightBitTrial if problem.precision in EIGHT_BITS else Trial)(problem, device)
