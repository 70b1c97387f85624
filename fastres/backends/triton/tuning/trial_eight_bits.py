"""A problem in 8 bits with operands: int8 must be the reference's bit for bit, fp8 to a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastres.backends.triton.planning.problems import Problem
from fastres.backends.triton.tuning.trial import Trial
from fastres.backends.triton.tuning.trial_vendor import VendorTrial
from fastres.kernels import reference
from fastres.kernels.bottleneck_chain import ChainScales
from fastres.kernels.folding import pack_stem_weight, packed_shape
from fastres.kernels.geometry import ConvShape, PoolShape
from fastres.kernels.space_to_depth import space_to_depth
from fastres.kernels.tiles.chain import ChainShape
from fastres.options import EIGHT_BITS

_UNWRITTEN = -128  # which no ReLU gives
_STEP = 0.126  # of e4m3, relative: 3 bits behind the point; a sum's own error besides
_SMALL = 2.0**-6  # the smallest e4m3 of full precision
# Of a result's RMS: what other roundings of a chain's inner values change, where sums differ by
# 2^-14 to 2^-11 of their size: 0.25 at most among 3 million values (PyTorch, no GPU).
_PASSED_ON = 0.5
_UNIFORM = 74.0  # RMS of uniform bytes
_SPREAD = 37.0  # of results, of which some then saturate


class EightBitTrial(Trial):
    """Random operands, with scales by which sums come to lie within the range of the result."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        super().__init__(problem, device)
        shape = problem.shape
        if isinstance(shape, ChainShape):
            self._scales = {"scales": self._chain_scales(shape)}
            return
        if isinstance(shape, PoolShape):  # which only chooses: no scale enters
            return
        depth = 3 * 49 if self._is_stem else shape.r * shape.s * shape.c // shape.groups
        if problem.floating:
            self._outputs = [out.to(torch.float16) for out in self._outputs]
        self._scales = {"scale": self._scale(shape.k, depth)}
        if problem.residual:
            self._scales["residual_scale"] = 0.4

    def poison(self) -> None:
        for out in self._outputs:
            out.fill_(_UNWRITTEN)

    def difference(self) -> str | None:
        for i, out in enumerate(self._outputs):
            if bool((out.float() == _UNWRITTEN).any()):
                return f"output {i} has elements that were not written"
        chosen = self.chosen()
        for i, (out, exact) in enumerate(zip(self._outputs, self._exact(chosen), strict=True)):
            wrong = int((self._off(out[chosen].float(), exact.float()) > 0).sum())
            if wrong:
                return f"{wrong} values of output {i} are not the reference's"
        return None

    def _off(self, found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        """By how much each value is further off than it may be."""
        off: torch.Tensor = (found - exact).abs()
        if self.problem.precision == "fp8":
            off -= _STEP * exact.abs().clamp_min(_SMALL)
            if isinstance(self.problem.shape, ChainShape):
                off -= _PASSED_ON * float(exact.square().mean().sqrt())
        return off

    def _scale(self, k: int, depth: int, size: float = _UNIFORM) -> torch.Tensor:
        """Scales of k channels, by which sums come to deviate by 37 and more or less.

        Args:
            depth: products in a sum, of a uniform byte each.
            size: RMS of what these are multiplied by.
        """
        if self._generator is None:
            return torch.empty(k, dtype=torch.float32, device=self.device)
        factors = torch.rand(k, generator=self._generator, device=self.device) + 0.5
        return factors * (_SPREAD / (_UNIFORM * size * math.sqrt(depth)))

    def _chain_scales(self, s: ChainShape) -> ChainScales:
        """Each of the three results deviates by about 40."""
        return ChainScales(
            w2=self._scale(s.mid, 9 * s.mid),
            w3=self._scale(s.ko, s.mid, 30.0),
            w1=self._scale(s.next_mid, s.ko, 40.0) if s.next_mid else None,
            projection=self._scale(s.ko, s.projected) if s.projected else None,
            residual=1.0 if s.projected else 0.4,
        )

    def _make_stem(self, s: ConvShape) -> None:
        self._x = self._random(s.n, 2 * s.p, 2 * s.q, 3)
        self._filters = self._random(s.k, 7, 7, 3)
        self._bias = self._random(s.k, dtype=torch.float32)
        self._outputs = [self._random(*self._stem_pixels(s), s.k)]
        self._matrix = pack_stem_weight(self._filters.permute(0, 3, 1, 2))
        self._folded = self._random(*packed_shape(s.n, 2 * s.p, 2 * s.q))
        if self._generator is not None:
            space_to_depth(self._x.half().permute(0, 3, 1, 2), out=self._folded)

    def _exact(self, chosen: torch.Tensor) -> list[torch.Tensor]:
        shape = self.problem.shape
        if isinstance(shape, ChainShape):
            return self._exact_chain(shape, chosen, self._scales["scales"])
        if isinstance(shape, PoolShape):
            return self._reference(chosen, torch.float32)
        x, residual = self._x[chosen], self._residual
        layer = (shape.dilation, shape.groups)
        sizes = ((2, 2), (3, 3)) if self._is_stem else (shape.stride, shape.padding, *layer)
        y = _finished(
            _sums(x, self._filters, *sizes),
            self._scales["scale"],
            self._bias,
            None if residual is None else residual[chosen],
            self._scales.get("residual_scale", 1.0),
            "relu",
            1.0,
            self._outputs[0].dtype,
        )
        if self.problem.kind == "stem and pool":
            y = reference.max_pool(y.permute(0, 3, 1, 2), (3, 3), (2, 2), (1, 1))
            y = y.permute(0, 2, 3, 1)
        return [y]

    def _exact_chain(
        self, s: ChainShape, chosen: torch.Tensor, scales: ChainScales
    ) -> list[torch.Tensor]:
        """Convolutions one after the other; what is projected is added as it is, not rounded."""
        stride, padding, step = (s.stride,) * 2, (1, 1), (s.shortcut_stride,) * 2
        w3, added, dtype = self._w3[..., : s.mid], self._shortcut[chosen], self._dtype
        if s.projected:
            sums = _sums(added, self._w3[..., s.mid :], step)
            plain = (None, None, 1.0, None, 1.0, torch.float32)
            added = _finished(sums, scales.projection, *plain)
        sums = _sums(self._x[chosen], self._w2, stride, padding)
        b = _finished(sums, scales.w2, self._b2, None, 1.0, "relu", scales.b, dtype)
        more = (self._b3, added, scales.residual, "relu", scales.out, dtype)
        found = [_finished(_sums(b, w3), scales.w3, *more)]
        if self._w1 is not None:
            last = (self._b1, None, 1.0, "relu", scales.a_next, dtype)
            found.append(_finished(_sums(found[0], self._w1), scales.w1, *last))
        return found

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


def _sums(x: torch.Tensor, weight: torch.Tensor, *sizes: Any) -> torch.Tensor:
    """The convolution of NHWC bytes with KRSC bytes, exact.

    Args:
        sizes: stride, padding, dilation and groups, as far as they are given.
    """
    planes, filters = (t.double().permute(0, 3, 1, 2) for t in (x, weight))
    return F.conv2d(planes, filters, None, *sizes).permute(0, 2, 3, 1)


def _finished(*arguments: Any) -> torch.Tensor:
    """`reference.finish_int8`, of either type of 8 bits; their values stay in fp32."""
    *given, dtype = arguments
    finish: Callable[..., torch.Tensor] = reference.finish_int8
    if dtype.itemsize > 1:
        return finish(*given, dtype)
    return reference.saturated(finish(*given, torch.float32), dtype)


def make_trial(problem: Problem, device: torch.device) -> Trial:
    """The trial of a problem: the vendor's, or of a kernel of ours in its precision."""
    if problem.kind == "vendor":
        return VendorTrial(problem, device)
    return (EightBitTrial if problem.precision in EIGHT_BITS else Trial)(problem, device)
