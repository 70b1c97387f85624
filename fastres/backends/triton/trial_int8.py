"""A problem in int8 with operands: its outputs must be the reference's, bit for bit."""

from __future__ import annotations

import torch

from fastres.backends.triton.problems import Problem
from fastres.backends.triton.trial import Trial
from fastres.kernels import reference
from fastres.kernels.chain_tiles import ChainShape
from fastres.kernels.folding import pack_stem_weight, packed_shape
from fastres.kernels.geometry import ConvShape
from fastres.kernels.space_to_depth import space_to_depth
from fastres.kernels.stem_pool_tiles import pooled

_UNWRITTEN = -128  # which no ReLU gives


class Int8Trial(Trial):
    """Random bytes, with scales by which sums come to lie within the range of int8."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        super().__init__(problem, device)
        shape = problem.shape
        assert not isinstance(shape, ChainShape)
        stem = problem.kind == "stem and pool"
        depth = 3 * 49 if stem else shape.r * shape.s * shape.c // shape.groups
        k = shape.k
        if device.type == "meta":
            scale = torch.empty(k, dtype=torch.float32, device=device)
        else:  # a sum has the deviation 74^2 sqrt(depth) of uniform bytes
            factors = torch.rand(k, generator=self._generator, device=device) + 0.5
            scale = factors * (50 / (74 * 74 * depth**0.5))
        floating = problem.floating
        if floating:
            self._outputs = [out.to(torch.float16) for out in self._outputs]
        self._scales = {"scale": scale, "out_scale": 1.0 if floating else 0.75}
        if problem.residual:
            self._scales["residual_scale"] = 0.5

    def poison(self) -> None:
        for out in self._outputs:
            out.fill_(_UNWRITTEN)

    def difference(self) -> str | None:
        (out,) = self._outputs
        if bool((out == _UNWRITTEN).any()):
            return "the output has elements that were not written"
        chosen = self.chosen()
        wrong = int((out[chosen] != self._exact(chosen)).sum())
        return f"{wrong} values of the output are not the reference's" if wrong else None

    def _make_stem(self, s: ConvShape) -> None:
        self._x = self._random(s.n, 2 * s.p, 2 * s.q, 3)
        self._filters = self._random(s.k, 7, 7, 3)
        self._bias = self._random(s.k, dtype=torch.float32)
        self._outputs = [self._random(s.n, pooled(s.p), pooled(s.q), s.k)]
        self._matrix = pack_stem_weight(self._filters.permute(0, 3, 1, 2))
        self._folded = self._random(*packed_shape(s.n, 2 * s.p, 2 * s.q))
        if self._generator is not None:
            space_to_depth(self._x.half().permute(0, 3, 1, 2), out=self._folded)

    def _exact(self, chosen: torch.Tensor) -> torch.Tensor:
        shape = self.problem.shape
        assert isinstance(shape, ConvShape)
        stem = self.problem.kind == "stem and pool"
        residual = None if self._residual is None else self._residual[chosen].permute(0, 3, 1, 2)
        y = reference.conv2d_int8(
            self._x[chosen].permute(0, 3, 1, 2),
            self._filters.permute(0, 3, 1, 2),
            self._scales["scale"],
            self._bias,
            stride=(2, 2) if stem else shape.stride,
            padding=(3, 3) if stem else shape.padding,
            dilation=(1, 1) if stem else shape.dilation,
            groups=1 if stem else shape.groups,
            residual=residual,
            residual_scale=self._scales.get("residual_scale", 1.0),
            activation="relu",
            out_scale=self._scales["out_scale"],
            dtype=self._outputs[0].dtype,
        )
        if stem:
            y = reference.max_pool(y.float(), (3, 3), (2, 2), (1, 1)).to(y.dtype)
        return y.permute(0, 2, 3, 1)

    def _random(
        self, *sizes: int, depth: int | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Bytes, whatever the depth; other types as ever."""
        if dtype is not None or self._generator is None:
            return super()._random(*sizes, dtype=dtype)
        return torch.randint(
            -127, 128, sizes, generator=self._generator, device=self.device, dtype=torch.int8
        )


def make_trial(problem: Problem, device: torch.device) -> Trial:
    """The trial of a problem in its precision."""
    return (Int8Trial if problem.precision == "int8" else Trial)(problem, device)
