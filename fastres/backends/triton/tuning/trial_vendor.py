"""A convolution by the vendor's library on random data: right, also about NaN and infinities."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastres.backends.triton.planning.problems import AnyTile, Problem
from fastres.backends.triton.planning.vendor import convolve
from fastres.backends.triton.tuning.trial import Trial
from fastres.errors import UnsupportedError
from fastres.kernels.cost import Target
from fastres.kernels.geometry import ConvShape
from fastres.kernels.launch import Launch


class VendorTrial(Trial):
    """Its result comes in memory of its own, so what is poisoned is what PyTorch gives out next."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        super().__init__(problem, device)
        self._narrow_bias = self._bias.to(self._dtype)  # once, as in a plan

    def launches(self, tile: AnyTile, target: Target) -> tuple[Launch, ...]:
        """None: there is nothing to compile."""
        return ()

    def calls(self, tile: AnyTile, target: Target) -> tuple[Callable[[], None], ...]:
        return (self._call,)

    def difference(self) -> str | None:
        """As of a kernel of ours.

        Raises:
            UnsupportedError: what is not finite becomes a number, or spreads to other pixels.
        """
        wrong = super().difference()
        if wrong is None:
            self._check_not_finite()
        return wrong

    def _call(self) -> None:
        shape = self.problem.shape
        assert isinstance(shape, ConvShape)
        self._outputs.clear()  # first, so that it may get this memory again
        result = convolve(
            self._x,
            self._filters,
            self._narrow_bias,
            self._residual,
            stride=shape.stride,
            padding=shape.padding,
            dilation=shape.dilation,
            groups=shape.groups,
        )
        self._outputs.append(result)

    def _check_not_finite(self) -> None:
        """Once more, with a NaN and an infinity in the first image; what is timed has none."""
        pixels = self._x[0, 0, 0], self._x[0, -1, -1]
        before = [pixel.clone() for pixel in pixels]
        for pixel, value in zip(pixels, (float("nan"), float("inf")), strict=True):
            pixel[0] = value
        self._call()
        chosen = self.chosen()
        with torch.backends.cudnn.flags(enabled=False):
            (exact,) = self._reference(chosen, torch.float64)
        found = self._outputs[0][chosen].double()
        for pixel, values in zip(pixels, before, strict=True):
            pixel.copy_(values)
        for kind in (torch.isnan, torch.isinf):
            if not torch.equal(kind(found), kind(exact)):
                raise UnsupportedError(f"{kind.__name__} of its result is not PyTorch's")
