"""Step → the kernel calls it stands for, on given memory: what every runner executes.

The tensors may be on the meta device: then the calls can be compiled, and nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from fastres.backends.triton.planning.eight_bits import around, inverse
from fastres.backends.triton.planning.plan import (
    AnyStep,
    LaunchAvgPool,
    LaunchBoxConv2d,
    LaunchChain,
    LaunchConv2d,
    LaunchElementwise,
    LaunchGlobalAvgPool,
    LaunchLinear,
    LaunchMaxPool,
    LaunchStem,
    LaunchStemPool,
    LaunchVendor,
    LoadInput,
    Plan,
    Scales,
)
from fastres.backends.triton.running.pack import Packed
from fastres.kernels.bottleneck_chain import ChainScales, chain_launch, chain_shape
from fastres.kernels.conv2d import conv2d_launch, conv2d_tma_launches
from fastres.kernels.cost import Target
from fastres.kernels.elementwise import elementwise_launch
from fastres.kernels.geometry import ConvShape, PoolShape
from fastres.kernels.launch import Launch
from fastres.kernels.layout import PICTURE_DTYPES, to_nhwc_launch
from fastres.kernels.linear import global_avg_pool_launch
from fastres.kernels.pool import avg_pool_launch, max_pool_launch
from fastres.kernels.reference import round_tf32
from fastres.kernels.space_to_depth import space_to_depth_launch
from fastres.kernels.stem import stem_launch
from fastres.kernels.stem_pool import stem_pool_launch

Tensors = Mapping[str, torch.Tensor]
Product: TypeAlias = LaunchConv2d | LaunchStem | LaunchStemPool | LaunchBoxConv2d | LaunchLinear


def bind(
    plan: Plan, step: AnyStep, at: Tensors, constants: Packed, target: Target
) -> tuple[Launch, ...]:
    """The calls of one step; none for `LoadInput`, which depends on the caller's tensors: `load`.

    Args:
        plan: that the step belongs to.
        at: the plan's tensors by name.
        constants: the graph's weights, on the same device.
        target: the GPU they are meant for.
    """
    assert not isinstance(step, LaunchVendor), "PyTorch's call, and no launch of ours"
    launches = _launches(step, at, constants, target, plan.allow_tf32)
    if plan.places[step.target].tf32:
        launches = tuple(launch.rounded() for launch in launches)
    return tuple(launch.overlapping() for launch in launches) if plan.dependent else launches


def _launches(
    step: AnyStep, at: Tensors, constants: Packed, target: Target, allow_tf32: bool
) -> tuple[Launch, ...]:
    if isinstance(step, LaunchConv2d):
        return (_conv2d(step, at, constants, target, allow_tf32),)
    if isinstance(step, LaunchStem):
        return (_stem(step, at, constants, target, allow_tf32),)
    if isinstance(step, LaunchStemPool):
        return (_stem_pool(step, at, constants),)
    if isinstance(step, LaunchBoxConv2d):
        return _box_conv2d(step, at, constants, target, allow_tf32)
    if isinstance(step, LaunchChain):
        return (_chain(step, at, constants, target),)
    if isinstance(step, LaunchMaxPool):
        return (_max_pool(step, at),)
    if isinstance(step, LaunchAvgPool):
        return (_avg_pool(step, at),)
    if isinstance(step, LaunchElementwise):
        return (_elementwise(step, at, constants),)
    if isinstance(step, LaunchGlobalAvgPool):
        return (_global_avg_pool(step, at),)
    if isinstance(step, LaunchLinear):
        return (_linear(step, at, constants, target, allow_tf32),)
    return ()


def load(
    plan: Plan, step: LoadInput, given: torch.Tensor, target: torch.Tensor, constants: Packed
) -> None:
    """Brings an input of the caller's into the plan's memory; `given` may have fewer images."""
    if given.dim() != 4:
        rounded = round_tf32(given.float()) if plan.places[step.target].tf32 else given
        target[: given.shape[0]].copy_(rounded)
        return
    if given.dtype not in PICTURE_DTYPES:
        given = given.float()  # of a model in float64, which runs in fp32
    if step.normalize is not None and step.normalize.flip:
        given = given.flip(1)
    load_launch(plan, step, given, target, constants).run()


def load_launch(
    plan: Plan, step: LoadInput, given: torch.Tensor, target: torch.Tensor, constants: Packed
) -> Launch:
    """The call that brings in pictures, their channels in the network's order."""
    build = space_to_depth_launch if step.folded else to_nhwc_launch
    factors = None if step.normalize is None else constants.factors(step.normalize)
    launch = build(given, target, normalise=factors, out_scale=inverse(step.scale))
    return launch.rounded() if plan.places[step.target].tf32 else launch


def _conv2d(
    step: LaunchConv2d, at: Tensors, constants: Packed, target: Target, allow_tf32: bool
) -> Launch:
    x, groups = at[step.source], step.groups // step.merged
    if step.merged == 1:
        weight = constants.filters(step.weight)
    else:
        weight = constants.grouped(step.weight, step.groups, step.merged)
    n, h, w, c = x.shape
    k, r, s, _ = weight.shape
    residual, offset = None, 0
    if step.shortcut is not None:
        stride, offset = step.shortcut.stride, step.shortcut.channel_offset
        residual = at[step.shortcut.source][:, ::stride, ::stride]
    return conv2d_launch(
        x,
        weight,
        _bias(step, [step.bias], constants),
        residual,
        at[step.target],
        shape=ConvShape(n, h, w, c, k, r, s, step.stride, step.padding, step.dilation, groups),
        target=target,
        merged=step.merged,
        residual_channel_offset=offset,
        activation=step.activation,
        **_scales(step, constants, residual is not None),
        tile=step.tile,
        allow_tf32=allow_tf32,
    )


def _stem(
    step: LaunchStem, at: Tensors, constants: Packed, target: Target, allow_tf32: bool
) -> Launch:
    return stem_launch(
        at[step.source],
        constants.stem(step.weight),
        _bias(step, [step.bias], constants),
        at[step.target],
        target=target,
        activation=step.activation,
        **_scales(step, constants),
        tile=step.tile,
        allow_tf32=allow_tf32,
    )


def _stem_pool(step: LaunchStemPool, at: Tensors, constants: Packed) -> Launch:
    return stem_pool_launch(
        at[step.source],
        constants.stem(step.weight),
        _bias(step, [step.bias], constants),
        at[step.target],
        activation=step.activation,
        **_scales(step, constants),
        tile=step.tile,
    )


def _box_conv2d(
    step: LaunchBoxConv2d, at: Tensors, constants: Packed, target: Target, allow_tf32: bool
) -> tuple[Launch, ...]:
    x, out = at[step.source], at[step.target]
    (n, h, w, c), (r, s) = x.shape, step.filter
    shape = ConvShape(n, h, w, c, out.shape[3], r, s, step.stride, step.padding, step.dilation)
    return conv2d_tma_launches(
        x,
        constants.interleaved(step.weight, step.projection),
        _bias(step, step.biases, constants),
        _optional(at, step.residual),
        out,
        shape=shape,
        target=target,
        x2=_optional(at, step.projected),
        stride2=step.projection_stride,
        activation=step.activation,
        **_scales(step, constants, step.residual is not None),
        tile=step.tile,
        workspace=_optional(at, step.workspace),
        counters=_optional(at, step.counters),
        allow_tf32=allow_tf32,
    )


def _chain(step: LaunchChain, at: Tensors, constants: Packed, target: Target) -> Launch:
    a = at[step.source]
    w2 = constants.interleaved(step.weight2).view(-1, 3, 3, a.shape[3])
    w3 = constants.interleaved(step.weight3, step.projection)[:, None, None, :]
    w1 = None
    if step.weight1 is not None:
        w1 = constants.interleaved(step.weight1)[:, None, None, :]
    scales, (of_b, of_out, of_next) = _chain_scales(step, constants)
    shape = chain_shape(a, w2, w3, w1, stride=step.stride, shortcut_stride=step.shortcut_stride)
    return chain_launch(
        a,
        w2,
        w3,
        at[step.shortcut],
        w1,
        constants.bias([step.bias2], of_b),
        constants.bias(step.biases3, of_out),
        constants.bias([step.bias1], of_next),
        at[step.target],
        _optional(at, step.next_target),
        shape=shape,
        target=target,
        activation=step.activation,
        scales=scales,
        tile=step.tile,
    )


def _linear(
    step: LaunchLinear, at: Tensors, constants: Packed, target: Target, allow_tf32: bool
) -> Launch:
    """A 1×1 convolution of a 1×1 picture."""
    x, weight, out = _rows(at[step.source]), constants.rows(step.weight), at[step.target]
    (n, c), k = x.shape, weight.shape[0]
    return conv2d_launch(
        x[:, None, None, :],
        weight[:, None, None, :],
        _bias(step, [step.bias], constants),
        None,
        out[:, None, None, :],
        shape=ConvShape(n, 1, 1, c, k, 1, 1),
        target=target,
        activation=step.activation,
        **_scales(step, constants),
        tile=step.tile,
        allow_tf32=allow_tf32,
    )


def _max_pool(step: LaunchMaxPool, at: Tensors) -> Launch:
    x = at[step.source]
    n, h, w, c = x.shape
    shape = PoolShape(
        n, h, w, c, step.kernel, step.stride, step.padding, step.dilation, step.ceil_mode
    )
    return max_pool_launch(x, at[step.target], shape=shape)


def _avg_pool(step: LaunchAvgPool, at: Tensors) -> Launch:
    x = at[step.source]
    n, h, w, c = x.shape
    shape = PoolShape(n, h, w, c, step.kernel, step.stride, step.padding, ceil_mode=step.ceil_mode)
    return avg_pool_launch(
        x, at[step.target], shape=shape, count_include_pad=step.count_include_pad
    )


def _elementwise(step: LaunchElementwise, at: Tensors, constants: Packed) -> Launch:
    scale = shift = None
    scales = step.scales or Scales()
    if step.norm is not None:
        scale, shift = constants.scale_and_shift(step.norm)
    return elementwise_launch(
        at[step.source],
        at[step.target],
        scale=scale,
        shift=shift,
        residual=_optional(at, step.residual),
        activation=step.activation,
        x_scale=scales.source,
        residual_scale=scales.residual,
        out_scale=inverse(scales.target),
    )


def _global_avg_pool(step: LaunchGlobalAvgPool, at: Tensors) -> Launch:
    scales = step.scales or Scales()
    return global_avg_pool_launch(
        at[step.source],
        _rows(at[step.target]),
        scale=scales.source,
        out_scale=inverse(scales.target),
    )


def _bias(step: Product, names: Sequence[str | None], constants: Packed) -> torch.Tensor | None:
    """What is added to a product, in what its result is rounded in."""
    if step.scales is None:
        return constants.bias(names)
    return constants.bias(names, around(step.scales.target, step.activation)[0])


def _scales(step: Product, constants: Packed, residual: bool = False) -> dict[str, Any]:
    """The arguments of a product of 8 bits; none of a floating-point one.

    Args:
        residual: whether something is added.
    """
    scales = step.scales
    if scales is None:
        return {}
    assert scales.weight is not None
    before, behind = around(scales.target, step.activation)
    given = {
        "scale": constants.products(scales.weight, scales.source, before),
        "out_scale": behind,
    }
    return given | ({"residual_scale": scales.residual * before} if residual else {})


def _chain_scales(
    step: LaunchChain, constants: Packed
) -> tuple[ChainScales | None, tuple[float, float, float]]:
    """The scales of a chain of 8 bits, and by what the biases of its results are multiplied."""
    scales = step.scales
    if scales is None:
        return None, (1.0, 1.0, 1.0)
    of_b, behind_b = around(scales.inner, step.activation)
    of_out, behind_out = around(scales.target, step.activation)
    of_next, behind_next = around(scales.next_target, step.activation)
    w1 = None
    if scales.weight1 is not None:
        w1 = constants.products(scales.weight1, scales.target, of_next)
    found = ChainScales(
        w2=constants.products(scales.weight2, scales.source, of_b),
        w3=constants.products(scales.weight3, scales.inner, of_out),
        w1=w1,
        residual=scales.shortcut * of_out,
        b=behind_b,
        out=behind_out,
        a_next=behind_next,
    )
    return found, (of_b, of_out, of_next)


def _optional(at: Tensors, name: str | None) -> torch.Tensor | None:
    return None if name is None else at[name]


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """A 1x1 map [N, 1, 1, C] as the matrix [N, C] that it is."""
    return tensor.flatten(1)
