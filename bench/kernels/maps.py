"""Kernels that multiply no matrices, over operands: pools, sums, layouts; each beside PyTorch.

Every function here lays out [n, side, side, channels] and returns calls with their check.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.posed import Posed, difference, normal, poisoned
from fastres.kernels import reference
from fastres.kernels.elementwise import elementwise_launch
from fastres.kernels.folding import packed_shape
from fastres.kernels.geometry import Pair, PoolShape
from fastres.kernels.launch import Launch
from fastres.kernels.layout import normalisation, to_nchw_launch, to_nhwc_launch
from fastres.kernels.linear import global_avg_pool_launch
from fastres.kernels.pool import avg_pool_launch, max_pool_launch
from fastres.kernels.space_to_depth import space_to_depth_launch
from fastres.tolerances import RMS_FLOOR

Lay = Callable[[torch.device, torch.dtype, int, int, int], Posed]
IMAGES = 2  # compared with PyTorch, from the end of the batch
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SCALES = {"x_scale": 0.02, "residual_scale": 0.03, "out_scale": 20.0}  # of a sum in 8 bits
_MEAN_SCALES = {"scale": 0.02, "out_scale": 100.0}  # a mean is smaller than what it is of
_PICTURE_SCALE = 40.0  # 1 / the scale of normalised pixels in 8 bits


def max_pool(device: torch.device, dtype: torch.dtype, n: int, side: int, channels: int) -> Posed:
    """The stem's: 3x3, stride 2, padding 1."""
    window: tuple[Pair, Pair, Pair] = ((3, 3), (2, 2), (1, 1))
    shape = PoolShape(n, side, side, channels, *window)
    x = normal(device, n, side, side, channels, dtype=dtype)
    y = poisoned(device, n, shape.p, shape.q, channels, dtype=dtype)
    launch = max_pool_launch(x, y, shape=shape)
    return _posed(
        launch, y, lambda some: _nhwc(reference.max_pool(_wide(x[some]), *window)), exact=True
    )


def avg_pool(device: torch.device, dtype: torch.dtype, n: int, side: int, channels: int) -> Posed:
    """That of a ResNet-D shortcut: 2x2, stride 2."""
    window: tuple[Pair, Pair] = ((2, 2), (2, 2))
    shape = PoolShape(n, side, side, channels, *window)
    x = normal(device, n, side, side, channels, dtype=dtype)
    y = poisoned(device, n, shape.p, shape.q, channels, dtype=dtype)
    launch = avg_pool_launch(x, y, shape=shape)
    return _posed(launch, y, lambda some: _nhwc(F.avg_pool2d(_wide(x[some]), *window)))


def global_pool(
    device: torch.device, dtype: torch.dtype, n: int, side: int, channels: int
) -> Posed:
    """The mean over a whole map."""
    x = normal(device, n, side, side, channels, dtype=dtype)
    y = poisoned(device, n, channels, dtype=dtype)
    if dtype == torch.int8:
        launch = global_avg_pool_launch(x, y, **_MEAN_SCALES)
        return _posed(
            launch,
            y,
            lambda some: reference.global_avg_pool_int8(
                x[some].permute(0, 3, 1, 2), *_MEAN_SCALES.values(), keepdim=False
            ),
            exact=True,
        )
    launch = global_avg_pool_launch(x, y)
    return _posed(launch, y, lambda some: reference.global_avg_pool(_wide(x[some]), keepdim=False))


def add_relu(device: torch.device, dtype: torch.dtype, n: int, side: int, channels: int) -> Posed:
    """What ends a block whose sum is no convolution's epilogue."""
    x, r = (normal(device, n, side, side, channels, dtype=dtype) for _ in range(2))
    y = poisoned(device, n, side, side, channels, dtype=dtype)
    if dtype == torch.int8:
        launch = elementwise_launch(x, y, residual=r, activation="relu", **_SCALES)
        return _posed(launch, y, lambda some: _sum_int8(x[some], r[some]), exact=True)
    launch = elementwise_launch(x, y, residual=r, activation="relu")
    return _posed(launch, y, lambda some: (x[some].double() + r[some].double()).relu())


def batch_norm(device: torch.device, dtype: torch.dtype, n: int, side: int, channels: int) -> Posed:
    """One that could not be folded, as in a pre-activation network."""
    x = normal(device, n, side, side, channels, dtype=dtype)
    scale, shift = (normal(device, channels, dtype=torch.float32) for _ in range(2))
    y = poisoned(device, n, side, side, channels, dtype=dtype)
    launch = elementwise_launch(x, y, scale=scale, shift=shift, activation="relu")
    return _posed(
        launch, y, lambda some: (x[some].double() * scale.double() + shift.double()).relu()
    )


def squeeze_excite(
    device: torch.device, dtype: torch.dtype, n: int, side: int, channels: int
) -> Posed:
    """Channels weighted for each image, and the block's sum."""
    x, r = (normal(device, n, side, side, channels, dtype=dtype) for _ in range(2))
    weights = normal(device, n, channels, dtype=dtype)
    y = poisoned(device, n, side, side, channels, dtype=dtype)
    launch = elementwise_launch(x, y, scale=weights, residual=r, activation="relu")
    return _posed(
        launch,
        y,
        lambda some: (
            x[some].double() * weights[some, None, None].double() + r[some].double()
        ).relu(),
    )


def transpose(
    to: Literal["nhwc", "nchw"],
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    side: int,
    channels: int,
) -> Posed:
    """A map from one layout to the other; partial(transpose, "nhwc") is one of them."""
    planes, pixels = (n, channels, side, side), (n, side, side, channels)
    x = normal(device, *(planes if to == "nhwc" else pixels), dtype=dtype)
    y = poisoned(device, *(pixels if to == "nhwc" else planes), dtype=dtype)
    order = (0, 2, 3, 1) if to == "nhwc" else (0, 3, 1, 2)
    launch = (to_nhwc_launch if to == "nhwc" else to_nchw_launch)(x, y)
    return _posed(launch, y, lambda some: x[some].double().permute(order), exact=True)


def pictures(
    form: Literal["plain", "folded"],
    source: torch.dtype,
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    side: int,
    channels: int,
) -> Posed:
    """A caller's pictures on their way in: fp32 planes, or packed bytes that are normalised.

    Args:
        form: how the stem reads them.
        source: float32 or uint8.
    """
    whole, normalise = source == torch.uint8, None
    x = normal(device, n, channels, side, side, dtype=torch.float32)
    if whole:
        x = (64 * x.abs()).clamp(max=255).to(source).permute(0, 2, 3, 1).contiguous()
        x = x.permute(0, 3, 1, 2)
        normalise = normalisation(MEAN, STD, device)
    out_scale = _PICTURE_SCALE if dtype == torch.int8 else 1.0
    sizes = packed_shape(n, side, side) if form == "folded" else (n, side, side, channels)
    y = poisoned(device, *sizes, dtype=dtype)
    make = space_to_depth_launch if form == "folded" else to_nhwc_launch
    launch = make(x, y, normalise=normalise, out_scale=out_scale)

    def expected(some: Tensor) -> Tensor:
        # in 8 bits each step is one fp32 operation; else one rounding is what tells y from this
        wide = torch.float32 if dtype == torch.int8 else torch.float64
        v = x[some].to(wide)
        if normalise is not None:
            scale, shift = normalise.to(wide).view(2, 1, -1, 1, 1)
            v = v * scale + shift
        v = v * out_scale
        v = reference.requantise(v) if dtype == torch.int8 else v
        return _folded(v) if form == "folded" else _nhwc(v)

    return _posed(launch, y, expected, exact=dtype == torch.int8)


def _posed(
    launch: Launch, y: Tensor, expected: Callable[[Tensor], Tensor], exact: bool = False
) -> Posed:
    """A launch with its check: all of y for what was not written, the last images for values.

    Args:
        expected: what the images at these indices are to be, of another making.
        exact: whether nothing is rounded, or all of it alike.
    """

    def wrong() -> str | None:
        unwritten = y.isnan() if y.is_floating_point() else y == -128
        if bool(unwritten.any()):
            return "elements that were not written, or NaN"
        some = torch.arange(max(0, len(y) - IMAGES), len(y), device=y.device)
        tolerance = 0.0 if exact else RMS_FLOOR[y.dtype]
        return difference(y[some], expected(some).double(), tolerance)

    return Posed([launch], wrong, launch.tile)


def _sum_int8(x: Tensor, r: Tensor) -> Tensor:
    scale = torch.tensor(_SCALES["x_scale"])
    more: tuple[Any, ...] = (r, _SCALES["residual_scale"], "relu", _SCALES["out_scale"])
    return reference.finish_int8(x, scale, None, *more, torch.int8)


def _folded(planes: Tensor) -> Tensor:
    """What `space_to_depth` means: 2x2 pixels in one of 16 channels, with a margin."""
    n, c, h, w = planes.shape
    y = planes.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return F.pad(y, (0, 16 - 4 * c, 2, 1, 2, 1))


def _wide(x: Tensor) -> Tensor:
    """NHWC pixels as PyTorch's planes, in float64."""
    return x.double().permute(0, 3, 1, 2)


def _nhwc(planes: Tensor) -> Tensor:
    return planes.permute(0, 2, 3, 1)
