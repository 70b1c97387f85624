"""The meaning of every operation, in PyTorch alone: what each kernel is compared with.

Logical NCHW; everything is computed in the dtype of the arguments, so callers pass float64 for an
oracle. Activations keep NaN, as PyTorch's do. What is quantised is int8, symmetric, zero point 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from fastres.kernels.epilogue import TF32_LIMIT, ActivationKind

Pair = tuple[int, int]


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair = (1, 1),
    groups: int = 1,
    residual: torch.Tensor | None = None,
    activation: ActivationKind | None = None,
) -> torch.Tensor:
    """y = act(x * weight + bias + residual).

    Args:
        x: [N, C, H, W].
        weight: [K, C/groups, R, S].
        bias: [K].
        residual: [N, K, P, Q].

    Returns:
        [N, K, P, Q].
    """
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _finish(y if residual is None else y + residual, activation)


def normalize(
    x: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    scale: float,
    flip: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y = (x * scale - mean) / std per channel of [N, C, H, W], at least in fp32, rounded once.

    Args:
        flip: reverse the channels before.
        dtype: of y.
    """
    wide = torch.promote_types(dtype, torch.float32)
    means, stds = (torch.tensor(v, dtype=wide, device=x.device).view(-1, 1, 1) for v in (mean, std))
    pixels = (x.flip(1) if flip else x).to(wide, memory_format=torch.contiguous_format)
    return ((pixels * scale - means) / stds).to(dtype)


def batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    activation: ActivationKind | None = None,
) -> torch.Tensor:
    """y = act(weight * (x - mean) / sqrt(var + eps) + bias), per channel of [N, C, H, W]."""
    # not torch.nn.functional's: some versions of it refuse an eps of 0
    y = torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)
    return _finish(y, activation)


def activation(x: torch.Tensor, kind: ActivationKind) -> torch.Tensor:
    """y = act(x); gelu is the exact form x * Phi(x)."""
    return _ACTIVATIONS[kind](x)


def add(a: torch.Tensor, b: torch.Tensor, activation: ActivationKind | None = None) -> torch.Tensor:
    """y = act(a + b), broadcasting."""
    return _finish(a + b, activation)


def mul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """y = a * b, broadcasting."""
    return a * b


def max_pool(
    x: torch.Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    ceil_mode: bool = False,
) -> torch.Tensor:
    """Maximum over each window of [N, C, H, W]; NaN wins, padding loses."""
    return F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)


def avg_pool(
    x: torch.Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> torch.Tensor:
    """Mean over each window of [N, C, H, W]."""
    return F.avg_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad)


def global_avg_pool(x: torch.Tensor, keepdim: bool = True) -> torch.Tensor:
    """Mean over H and W: [N, C, H, W] to [N, C, 1, 1], or [N, C]."""
    return x.mean((2, 3), keepdim=keepdim)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: ActivationKind | None = None,
) -> torch.Tensor:
    """y = act(x @ weight.T + bias) with weight [K, C]."""
    return _finish(F.linear(x, weight, bias), activation)


def flatten(x: torch.Tensor, start_dim: int) -> torch.Tensor:
    """Joins all dimensions from `start_dim` on."""
    return x.flatten(start_dim)


def concat(xs: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Joins tensors along `dim`."""
    return torch.cat(list(xs), dim)


def pad(
    x: torch.Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0
) -> torch.Tensor:
    """Adds `before[i]` and `after[i]` elements of `value` to dimension i."""
    pairs = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    return F.pad(x, pairs, value=value)


def slice_(
    x: torch.Tensor,
    starts: Sequence[int],
    stops: Sequence[int | None],
    steps: Sequence[int],
) -> torch.Tensor:
    """x[start:stop:step] in every dimension; a stop of None is the end."""
    return x[tuple(slice(*cut) for cut in zip(starts, stops, steps, strict=True))]


def softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    """y = exp(x) / sum(exp(x)) along `dim`."""
    return x.softmax(dim)


def round_tf32(x: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of 10 bits behind the point, ties to even, as fp32; NaN stays.

    What a product in TF32 is given: tensor cores cut the other 13 bits off. Finite numbers stay
    finite: those that would become infinite are left to be cut off.

    Args:
        x: fp32, any strides.
    """
    bits = x.view(torch.int32)
    nearest = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
    return torch.where(x.abs() < TF32_LIMIT, nearest.view(torch.float32), x)


def quantise(x: torch.Tensor, scale: float) -> torch.Tensor:
    """q = round(x / scale), half to even, saturated to -128 to 127; int8, zero point 0."""
    return requantise(x / scale)


def dequantise(
    q: torch.Tensor, scale: float | torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """x = q * scale; a tensor of scales [K] goes along dimension 0."""
    if isinstance(scale, torch.Tensor):
        scale = scale.to(dtype).view(-1, *[1] * (q.ndim - 1))
    return q.to(dtype) * scale


def requantise(v: torch.Tensor) -> torch.Tensor:
    """Rounds half to even and saturates: int8 in units of the scale that v is in; NaN becomes 0."""
    return saturated(v).nan_to_num(0.0).to(torch.int8)


def saturated(v: torch.Tensor, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """What 8 bits make of v, in v's dtype; NaN, for which integers have nothing, stays."""
    if dtype == torch.uint8:
        return v.round().clamp(0, 255)
    if dtype == torch.float8_e4m3fn:
        return v.clamp(-448, 448).to(dtype).to(v.dtype)
    return v.round().clamp(-128, 127)


def conv2d_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair = (1, 1),
    groups: int = 1,
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    activation: ActivationKind | None = None,
    out_scale: float = 1.0,
    dtype: torch.dtype = torch.int8,
) -> torch.Tensor:
    """A convolution of integers, exact, and then `finish_int8` on its int32 accumulator.

    Args:
        x: [N, C, H, W] int8.
        weight: [K, C/groups, R, S] int8.
        scale, bias, residual, residual_scale, activation, out_scale, dtype: see `finish_int8`.
    """
    wide = x.to(torch.float64), weight.to(torch.float64)  # exact: sums stay below 2**53
    acc = F.conv2d(*wide, None, stride, padding, dilation, groups).to(torch.int32)
    shape = (1, -1, 1, 1)
    return finish_int8(
        acc,
        scale.view(shape),
        None if bias is None else bias.view(shape),
        residual,
        residual_scale,
        activation,
        out_scale,
        dtype,
    )


def linear_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: ActivationKind | None = None,
    out_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """As `conv2d_int8`, for x [M, C] and weight [K, C]."""
    acc = (x.to(torch.float64) @ weight.to(torch.float64).T).to(torch.int32)
    return finish_int8(acc, scale, bias, None, 1.0, activation, out_scale, dtype)


def global_avg_pool_int8(
    x: torch.Tensor,
    scale: float,
    out_scale: float = 1.0,
    dtype: torch.dtype = torch.int8,
    keepdim: bool = True,
) -> torch.Tensor:
    """The sum over H and W, exact, and then `finish_int8` with a scale of scale / (H W).

    Args:
        x: [N, C, H, W] int8, in units of scale.
    """
    acc = x.sum((2, 3), keepdim=keepdim, dtype=torch.int32)
    mean = acc.new_tensor(scale / (x.shape[2] * x.shape[3]), dtype=torch.float32)
    return finish_int8(acc, mean, None, None, 1.0, None, out_scale, dtype)


def finish_int8(
    acc: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_scale: float,
    activation: ActivationKind | None,
    out_scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y = act(acc * scale + bias + residual * residual_scale) * out_scale.

    Every step is one fp32 operation, rounded by itself (no fused multiply-add), in this order; what
    is None is left out, and so is a multiplication by an out_scale of 1.

    Args:
        acc: int32.
        scale: fp32, broadcast over acc: s_x * s_w per output channel.
        bias: fp32, broadcast over acc.
        residual: int8 (or a float) of acc's shape, in units of residual_scale.
        out_scale: 1 / s_y for an int8 result, 1 for a float, and where scale, bias and
            residual_scale hold it already, as a ReLU allows (plans have them so).
        dtype: of y. int8: rounded half to even and saturated; else cast.
    """
    v = acc.to(torch.float32) * scale.to(torch.float32)
    if bias is not None:
        v = v + bias.to(torch.float32)
    if residual is not None:
        v = v + residual.to(torch.float32) * v.new_tensor(residual_scale)
    v = _finish(v, activation)
    if out_scale != 1.0:
        v = v * v.new_tensor(out_scale)
    return requantise(v) if dtype == torch.int8 else v.to(dtype)


_ACTIVATIONS: dict[ActivationKind, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
}


def _finish(y: torch.Tensor, kind: ActivationKind | None) -> torch.Tensor:
    """act(y), of a y that nobody else reads: a ReLU overwrites it."""
    if kind == "relu":
        return y.relu_()
    return y if kind is None else activation(y, kind)
