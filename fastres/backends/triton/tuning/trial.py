"""A problem with operands: random data, outputs to be poisoned, and what PyTorch makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastres.backends.triton.planning.eight_bits import OPERAND_OF
from fastres.backends.triton.planning.problems import AnyTile, Problem
from fastres.kernels.bottleneck_chain import chain_launch
from fastres.kernels.conv2d import conv2d_launch, conv2d_tma_launches
from fastres.kernels.conv2d.parts import new_parts
from fastres.kernels.cost import Target
from fastres.kernels.folding import pack_stem_weight, packed_shape
from fastres.kernels.geometry import ConvShape, Pair, PoolShape
from fastres.kernels.launch import Launch
from fastres.kernels.pairs import interleaved
from fastres.kernels.pool import max_pool_launch
from fastres.kernels.reference import round_tf32
from fastres.kernels.space_to_depth import space_to_depth
from fastres.kernels.stem import stem_launch
from fastres.kernels.stem_pool import stem_pool_launch
from fastres.kernels.tiles import BoxTile, ChainTile, ConvTile, StemPoolTile
from fastres.kernels.tiles.chain import ChainShape
from fastres.kernels.tiles.stem_pool import pooled
from fastres.tolerances import errors

_IMAGES = 2  # compared with the oracle, from each end of the batch


class Trial:
    """One problem on one device; on "meta" its launches can be compiled, and nothing more.

    Values are scaled as in a trained network: products neither vanish nor overflow. In TF32 they
    are rounded to that, and so is what comes out, as between the kernels of a plan.
    """

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem = problem
        self.device = device
        self._dtype = OPERAND_OF[problem.precision]
        self._narrow = problem.precision == "tf32"
        self._scales: dict[str, Any] = {}  # further arguments of the kernels
        self._residual: torch.Tensor | None = None
        self._generator = None
        if device.type != "meta":
            self._generator = torch.Generator(device).manual_seed(0)
        shape = problem.shape
        if isinstance(shape, ChainShape):
            self._make_chain(shape)
        elif isinstance(shape, PoolShape):
            self._x = self._random(shape.n, shape.h, shape.w, shape.c)
            self._outputs = [self._random(shape.n, shape.p, shape.q, shape.c)]
        elif self._is_stem:
            self._make_stem(shape)
        else:
            self._make_convolution(shape)

    def poison(self) -> None:
        """Fills the outputs with NaN."""
        for out in self._outputs:
            out.fill_(float("nan"))

    def launches(self, tile: AnyTile, target: Target) -> tuple[Launch, ...]:
        """The calls that compute the outputs."""
        launches = self._launches(tile, target)
        return tuple(launch.rounded() for launch in launches) if self._narrow else launches

    def calls(self, tile: AnyTile, target: Target) -> tuple[Callable[[], None], ...]:
        """The same, to be made."""
        return tuple(launch.run for launch in self.launches(tile, target))

    def _launches(self, tile: AnyTile, target: Target) -> tuple[Launch, ...]:
        shape = self.problem.shape
        if isinstance(shape, ChainShape):
            assert isinstance(tile, ChainTile)
            return (self._chain_launch(shape, tile, target),)
        if isinstance(shape, PoolShape):
            return (max_pool_launch(self._x, self._outputs[0], shape=shape),)
        if isinstance(tile, BoxTile):
            return self._box_launches(shape, tile, target)
        if isinstance(tile, StemPoolTile):
            operands = self._folded, self._matrix, self._bias, self._outputs[0]
            return (stem_pool_launch(*operands, tile=tile, **self._scales),)
        assert isinstance(tile, ConvTile)
        if self.problem.kind == "folded stem":
            operands = self._folded, self._matrix, self._bias, self._outputs[0]
            more = {"tile": tile, "target": target, "allow_tf32": self._narrow, **self._scales}
            return (stem_launch(*operands, **more),)
        launch = conv2d_launch(
            self._x,
            self._filters,
            self._bias,
            self._residual,
            self._outputs[0],
            shape=shape,
            target=target,
            merged=self.problem.merged,
            activation="relu",
            tile=tile,
            allow_tf32=self._narrow,
            **self._scales,
        )
        return (launch,)

    def difference(self) -> str | None:
        """How far the outputs are from PyTorch's in float64; None if within the policy.

        The first and the last images are compared; every element must have been written.
        """
        for i, out in enumerate(self._outputs):
            if bool(torch.isnan(out).any()):
                return f"output {i} has elements that were not written, or NaN"
        chosen = self.chosen()
        with torch.backends.cudnn.flags(enabled=False):  # no TF32, no algorithm that rounds
            oracle, baseline = (
                self._reference(chosen, dtype) for dtype in (torch.float64, self._dtype)
            )
        if self._narrow:
            baseline = [round_tf32(usual) for usual in baseline]
        for i, (out, exact, usual) in enumerate(zip(self._outputs, oracle, baseline, strict=True)):
            found = errors(out[chosen], exact)
            if not found.within(errors(usual, exact), self._dtype):
                return f"output {i} is wrong: {found}"
        return None

    def chosen(self) -> torch.Tensor:
        """The images that are compared: some from each end of the batch."""
        images = len(self._outputs[0])
        ends = sorted({*range(min(_IMAGES, images)), *range(max(0, images - _IMAGES), images)})
        return torch.tensor(ends, device=self.device)

    def _make_convolution(self, shape: ConvShape) -> None:
        n, k, depth = shape.n, shape.k, shape.r * shape.s * shape.c // shape.groups
        projection = self.problem.projection
        total = depth + (projection.channels if projection else 0)
        pixels = (n, shape.p, shape.q)
        self._x = self._random(n, shape.h, shape.w, shape.c, positive=True)
        self._filters = self._random(k, shape.r, shape.s, shape.c // shape.groups, depth=total)
        self._bias = self._random(k, dtype=torch.float32)
        self._residual = self._random(*pixels, k) if self.problem.residual else None
        self._x2: torch.Tensor | None = None
        self._matrix = self._filters.flatten(1)
        self._stride2: Pair = (1, 1)
        if projection is not None:
            self._stride2 = projection.stride
            h2, w2 = (p * s for p, s in zip(pixels[1:], projection.stride, strict=True))
            self._x2 = self._random(n, h2, w2, projection.channels, positive=True)
            self._weight2 = self._random(k, projection.channels, depth=total)
            self._matrix = torch.cat([self._matrix, self._weight2], 1)
        self._outputs = [self._random(*pixels, k)]

    def _make_stem(self, s: ConvShape) -> None:
        self._x = self._random(s.n, 2 * s.p, 2 * s.q, 3)
        self._filters = self._random(s.k, 7, 7, 3, depth=3 * 49)
        self._bias = self._random(s.k, dtype=torch.float32)
        self._outputs = [self._random(*self._stem_pixels(s), s.k)]
        self._matrix = pack_stem_weight(self._filters.permute(0, 3, 1, 2))
        self._folded = self._random(*packed_shape(s.n, 2 * s.p, 2 * s.q))
        if self._generator is not None:
            space_to_depth(self._x.permute(0, 3, 1, 2), out=self._folded)

    @property
    def _is_stem(self) -> bool:
        return self.problem.kind in ("folded stem", "stem and pool")

    def _stem_pixels(self, s: ConvShape) -> tuple[int, int, int]:
        """N, P and Q of what a stem gives."""
        if self.problem.kind == "folded stem":
            return s.n, s.p, s.q
        return s.n, pooled(s.p), pooled(s.q)

    def _make_chain(self, s: ChainShape) -> None:
        pixels = (s.n, s.p, s.q)
        self._x = self._random(s.n, s.h, s.w, s.mid, positive=True)
        self._w2 = self._random(s.mid, 3, 3, s.mid, depth=9 * s.mid)
        self._w3 = self._random(s.ko, 1, 1, s.mid + s.projected, depth=s.mid + s.projected)
        self._w1 = self._random(s.next_mid, 1, 1, s.ko, depth=s.ko) if s.next_mid else None
        self._b2, self._b3 = (self._random(k, dtype=torch.float32) for k in (s.mid, s.ko))
        self._b1 = self._random(s.next_mid, dtype=torch.float32) if s.next_mid else None
        step = s.shortcut_stride
        sizes = (s.n, step * s.p, step * s.q, s.projected) if s.projected else (*pixels, s.ko)
        self._shortcut = self._random(*sizes, positive=True)
        self._outputs = [self._random(*pixels, s.ko)]
        if s.next_mid:
            self._outputs.append(self._random(*pixels, s.next_mid))

    def _box_launches(self, shape: ConvShape, tile: BoxTile, target: Target) -> tuple[Launch, ...]:
        return conv2d_tma_launches(
            self._x,
            interleaved(self._matrix),
            self._bias,
            self._residual,
            self._outputs[0],
            shape=shape,
            target=target,
            x2=self._x2,
            stride2=self._stride2,
            activation="relu",
            tile=tile,
            allow_tf32=self._narrow,
            **new_parts(shape, tile, self._x, self.problem.projection),
            **self._scales,
        )

    def _chain_launch(self, shape: ChainShape, tile: ChainTile, target: Target) -> Launch:
        out, a_next = (*self._outputs, None)[:2]
        assert out is not None
        return chain_launch(
            self._x,
            interleaved(self._w2),
            interleaved(self._w3),
            self._shortcut,
            None if self._w1 is None else interleaved(self._w1),
            self._b2,
            self._b3,
            self._b1,
            out,
            a_next,
            shape=shape,
            target=target,
            activation="relu",
            tile=tile,
            **self._scales,
        )

    def _reference(self, chosen: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        shape = self.problem.shape
        if isinstance(shape, ChainShape):
            return self._chain_reference(shape, chosen, dtype)
        if isinstance(shape, PoolShape):
            return [_pooled(self._x[chosen].to(dtype), shape)]
        x = self._x[chosen]
        if self._is_stem:
            y = _conv(x, self._filters, dtype, (2, 2), (3, 3))
            y = (y + self._bias.to(dtype)).relu()
            if self.problem.kind == "folded stem":
                return [y]
            return [F.max_pool2d(y.permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1)]
        y = _conv(x, self._filters, dtype, shape.stride, shape.padding, shape)
        if self._x2 is not None:
            weight2 = self._weight2[:, None, None, :]
            y = y + _conv(self._x2[chosen], weight2, dtype, self._stride2)
        y = y + self._bias.to(dtype)
        if self._residual is not None:
            y = y + self._residual[chosen].to(dtype)
        return [y.relu()]

    def _chain_reference(
        self, s: ChainShape, chosen: torch.Tensor, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        stride = (s.stride, s.stride)
        b = _conv(self._x[chosen], self._w2, dtype, stride, (1, 1)) + self._b2.to(dtype)
        w3, shortcut = self._w3[..., : s.mid], self._shortcut[chosen]
        y = _conv(b.relu(), w3, dtype)
        if s.projected:
            step = (s.shortcut_stride, s.shortcut_stride)
            y = y + _conv(shortcut, self._w3[..., s.mid :], dtype, step)
        else:
            y = y + shortcut.to(dtype)
        found = [(y + self._b3.to(dtype)).relu()]
        if self._w1 is not None and self._b1 is not None:
            found.append((_conv(found[0], self._w1, dtype) + self._b1.to(dtype)).relu())
        return found

    def _random(
        self,
        *sizes: int,
        depth: int | None = None,
        dtype: torch.dtype | None = None,
        positive: bool = False,
    ) -> torch.Tensor:
        """Normal values; of so many in a sum, scaled to keep its size; positive as after a ReLU."""
        if self._generator is None:
            return torch.empty(sizes, dtype=dtype or self._dtype, device=self.device)
        values = torch.randn(sizes, generator=self._generator, device=self.device)
        if depth is not None:
            values *= (2 / depth) ** 0.5
        values = (values.relu_() if positive else values).to(dtype or self._dtype)
        return round_tf32(values) if self._narrow and dtype is None else values


def _pooled(x: torch.Tensor, shape: PoolShape) -> torch.Tensor:
    """The largest of each window, NHWC."""
    assert not shape.ceil_mode
    windows = shape.kernel, shape.stride, shape.padding, shape.dilation
    return F.max_pool2d(x.permute(0, 3, 1, 2), *windows).permute(0, 2, 3, 1)


def _conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    shape: ConvShape | None = None,
) -> torch.Tensor:
    """The convolution of NHWC pixels with KRSC weights, in PyTorch."""
    dilation, groups = (shape.dilation, shape.groups) if shape is not None else ((1, 1), 1)
    planes, filters = x.to(dtype).permute(0, 3, 1, 2), weight.to(dtype).permute(0, 3, 1, 2)
    y = F.conv2d(planes, filters, None, stride, padding, dilation, groups)
    return y.permute(0, 2, 3, 1)
