"""The launches worth compiling for every target: each kernel family on ResNet's own shapes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastres.kernels.aot.compiling import TYPES
from fastres.kernels.aot.layers import (
    BOXES,
    CHAINS,
    CLASSIFIER,
    CONV_1X1,
    CONV_3X3,
    LAYERS,
    Boxes,
    Layer,
)
from fastres.kernels.bottleneck_chain import ChainScales, chain_launch
from fastres.kernels.conv2d import conv2d_launch, conv2d_tma_launches
from fastres.kernels.conv2d.parts import new_parts
from fastres.kernels.cost import Target
from fastres.kernels.elementwise import elementwise_launch
from fastres.kernels.folding import packed_shape
from fastres.kernels.geometry import PoolShape
from fastres.kernels.launch import Launch
from fastres.kernels.layout import to_nchw_launch, to_nhwc_launch
from fastres.kernels.linear import global_avg_pool_launch
from fastres.kernels.pool import avg_pool_launch, max_pool_launch
from fastres.kernels.quantised import is_bytes
from fastres.kernels.space_to_depth import space_to_depth_launch
from fastres.kernels.stem import stem_launch
from fastres.kernels.stem_pool import stem_pool_launch
from fastres.kernels.tiles.box_choice import choose_box_tile
from fastres.kernels.tiles.chain import ChainShape


@dataclass(frozen=True)
class CompileCase:
    """One launch worth compiling.

    Args:
        name: layer, batch and dtype, as in "layer1.0.conv2-b256-fp16".
        launch: the call, on meta tensors.
    """

    name: str
    launch: Launch


def conv2d_cases(sm: int) -> Iterator[CompileCase]:
    """ResNet-50's kinds of convolution, ResNeXt's and the classifier, at batch 256 and 1."""
    target = Target.typical(sm)
    for layer in LAYERS:
        yield conv2d_case(layer, 256, torch.float16, target)
    for layer in (CONV_3X3, CONV_1X1):
        yield conv2d_case(layer, 256, torch.bfloat16, target)
    for layer in (CONV_3X3, CONV_1X1, CLASSIFIER):
        yield conv2d_case(layer, 1, torch.float16, target)
    for allow_tf32 in (False, True):
        yield conv2d_case(CONV_3X3, 256, torch.float32, target, allow_tf32)


def pool_cases() -> Iterator[CompileCase]:
    """ResNet's only max pool, and the average pool of a ResNet-D shortcut."""
    shape = PoolShape(256, 112, 112, 64, (3, 3), (2, 2), (1, 1))
    for dtype in (torch.float16, torch.bfloat16):
        x, y = meta(256, 112, 112, 64, dtype=dtype), meta(256, 56, 56, 64, dtype=dtype)
        yield CompileCase(f"maxpool-b256-{TYPES[dtype]}", max_pool_launch(x, y, shape=shape))
    shape = PoolShape(256, 56, 56, 256, (2, 2), (2, 2))
    x, y = (
        meta(256, 56, 56, 256, dtype=torch.float16),
        meta(256, 28, 28, 256, dtype=torch.float16),
    )
    yield CompileCase("resnet-d.avgpool-b256-fp16", avg_pool_launch(x, y, shape=shape))


def linear_cases() -> Iterator[CompileCase]:
    """ResNet-50's global average pool; its classifier is among `conv2d_cases`."""
    x, y = meta(256, 7, 7, 2048, dtype=torch.float16), meta(256, 2048, dtype=torch.float16)
    yield CompileCase("avgpool-b256-fp16", global_avg_pool_launch(x, y))


def chain_cases(sm: int) -> Iterator[CompileCase]:
    """The boundaries of ResNet-50's first two stages and of Wide ResNet's; none below sm_90."""
    if sm < 90:
        return
    for name, shape in CHAINS.items():
        yield chain_case(name, replace(shape, n=256), torch.float16, sm)
    for name in ("layer1.1", "layer2.1"):
        yield chain_case(name, replace(CHAINS[name], n=256), torch.bfloat16, sm)
    for name in ("layer1.1", "layer2.0", "layer2.1"):
        yield chain_case(name, replace(CHAINS[name], n=1), torch.float16, sm)


def conv2d_tma_cases(sm: int) -> Iterator[CompileCase]:
    """ResNet-50's convolutions after the stem at batch 256 and 1; none below sm_90."""
    if sm < 90:
        return
    for n in (256, 1):
        for name, boxes in BOXES.items():
            yield from boxes_cases(name, boxes, n, torch.float16, sm)
    for name in ("layer2.0.conv2", "layer2.1.conv3"):
        for dtype in (torch.bfloat16, torch.float32):
            yield from boxes_cases(name, BOXES[name], 256, dtype, sm)


def layout_cases() -> Iterator[CompileCase]:
    """Pictures on their way in, and maps both ways."""
    half = torch.float16
    picture, y = meta(256, 3, 224, 224, dtype=torch.float32), meta(256, 224, 224, 3, dtype=half)
    yield CompileCase("picture.to_nhwc-b256-fp16", to_nhwc_launch(picture, y))
    rgb = meta(256, 224, 224, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    normalise = meta(2, 3, dtype=torch.float32)
    launch = to_nhwc_launch(rgb, y, normalise=normalise)
    yield CompileCase("bytes.to_nhwc-b256-fp16", launch)
    nchw, nhwc = meta(256, 64, 56, 56, dtype=half), meta(256, 56, 56, 64, dtype=half)
    yield CompileCase("map.to_nhwc-b256-fp16", to_nhwc_launch(nchw, nhwc))
    yield CompileCase("map.to_nchw-b256-fp16", to_nchw_launch(nhwc, nchw))


def stem_cases(sm: int) -> Iterator[CompileCase]:
    """The ImageNet stem over folded pixels, with its pool and without, at batch 256 and 1."""
    half, target = torch.float16, Target.typical(sm)
    for n in (256, 1):
        packed = meta(*packed_shape(n, 224, 224), dtype=half)
        launch = space_to_depth_launch(meta(n, 3, 224, 224, dtype=torch.float32), packed)
        yield CompileCase(f"conv1.fold-b{n}-fp16", launch)
        rgb = meta(n, 224, 224, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        normalise = meta(2, 3, dtype=torch.float32)
        launch = space_to_depth_launch(rgb, packed, normalise=normalise)
        yield CompileCase(f"conv1.fold-bytes-b{n}-fp16", launch)
        weight, bias = meta(64, 256, dtype=half), meta(64, dtype=torch.float32)
        out = meta(n, 112, 112, 64, dtype=half)
        launch = stem_launch(packed, weight, bias, out, target=target)
        yield CompileCase(f"conv1.folded-b{n}-fp16", launch)
        launch = stem_pool_launch(packed, weight, bias, meta(n, 56, 56, 64, dtype=half))
        yield CompileCase(f"conv1.folded+maxpool-b{n}-fp16", launch)


def elementwise_cases() -> Iterator[CompileCase]:
    """What a plan may not be able to fold: a sum, a BatchNorm, and squeeze-and-excitation."""
    half = torch.float16
    x, r, y = (meta(256, 56, 56, 256, dtype=half) for _ in range(3))
    launch = elementwise_launch(x, y, residual=r, activation="relu")
    yield CompileCase("add_relu-b256-fp16", launch)
    scale, shift = meta(256, dtype=torch.float32), meta(256, dtype=torch.float32)
    launch = elementwise_launch(x, y, scale=scale, shift=shift, activation="relu")
    yield CompileCase("batch_norm-b256-fp16", launch)
    launch = elementwise_launch(
        x, y, scale=meta(256, 256, dtype=half), residual=r, activation="relu"
    )
    yield CompileCase("squeeze_excite-b256-fp16", launch)


def all_cases(sm: int) -> Iterator[CompileCase]:
    """Every family's cases for one target."""
    yield from conv2d_cases(sm)
    yield from pool_cases()
    yield from linear_cases()
    yield from layout_cases()
    yield from stem_cases(sm)
    yield from elementwise_cases()
    yield from chain_cases(sm)
    yield from conv2d_tma_cases(sm)


def conv2d_case(
    layer: Layer,
    batch: int,
    dtype: torch.dtype,
    target: Target,
    allow_tf32: bool = False,
    out_dtype: torch.dtype | None = None,
) -> CompileCase:
    """A layer over pointers; `out_dtype` is dtype when None."""
    scales: dict[str, Any] = {"scale": meta(layer.k, dtype=torch.float32)}
    if layer.residual:
        scales["residual_scale"] = 0.125
    shape = layer.shape(batch)
    y_sizes = (batch, shape.p, shape.q, layer.k)
    launch = conv2d_launch(
        meta(batch, layer.size, layer.size, layer.c, dtype=dtype),
        meta(layer.k, layer.taps, layer.taps, layer.c // shape.groups, dtype=dtype),
        meta(layer.k, dtype=torch.float32),
        meta(*y_sizes, dtype=dtype) if layer.residual else None,
        meta(*y_sizes, dtype=out_dtype or dtype),
        shape=shape,
        merged=layer.merged,
        activation=layer.activation,
        allow_tf32=allow_tf32,
        target=target,
        **(scales if is_bytes(dtype) else {}),
    )
    kind = "tf32" if allow_tf32 else TYPES[dtype]
    kind += "" if out_dtype is None else f"-to-{TYPES[out_dtype]}"
    launch = launch.rounded() if allow_tf32 else launch  # as within a plan
    return CompileCase(f"{layer.name}-b{batch}-{kind}", launch)


def chain_case(name: str, shape: ChainShape, dtype: torch.dtype, sm: int) -> CompileCase:
    """A bottleneck boundary."""
    scales = None
    if is_bytes(dtype):
        scales = ChainScales(
            w2=meta(shape.mid, dtype=torch.float32),
            w3=meta(shape.ko, dtype=torch.float32),
            w1=meta(shape.next_mid, dtype=torch.float32) if shape.next_mid else None,
            projection=meta(shape.ko, dtype=torch.float32) if shape.projected else None,
            residual=1.0 if shape.projected else 0.02,
        )
    n, p, q, step = shape.n, shape.p, shape.q, shape.shortcut_stride
    launch = chain_launch(
        meta(n, shape.h, shape.w, shape.mid, dtype=dtype),
        meta(shape.mid, 3, 3, shape.mid, dtype=dtype),
        meta(shape.ko, 1, 1, shape.mid + shape.projected, dtype=dtype),
        meta(n, step * p, step * q, shape.projected or shape.ko, dtype=dtype),
        meta(shape.next_mid, 1, 1, shape.ko, dtype=dtype) if shape.next_mid else None,
        meta(shape.mid, dtype=torch.float32),
        meta(shape.ko, dtype=torch.float32),
        meta(shape.next_mid, dtype=torch.float32) if shape.next_mid else None,
        meta(n, p, q, shape.ko, dtype=dtype),
        meta(n, p, q, shape.next_mid, dtype=dtype) if shape.next_mid else None,
        shape=shape,
        target=Target.typical(sm),
        scales=scales,
    )
    return CompileCase(f"{name}.chain-b{n}-{TYPES[dtype]}", launch)


def boxes_cases(
    name: str, boxes: Boxes, n: int, dtype: torch.dtype, sm: int
) -> Iterator[CompileCase]:
    """One case; where the depth is split both ways to add up its parts, the second kernel's and
    the last part's."""
    shape, projection, target = replace(boxes.shape, n=n), boxes.projection, Target.typical(sm)
    y_sizes, depth, x2 = (n, shape.p, shape.q, shape.k), shape.r * shape.s * shape.c, None
    if projection is not None:
        step, depth = projection.stride[0], depth + projection.channels
        x2 = meta(n, step * shape.p, step * shape.q, projection.channels, dtype=dtype)
    fp8 = dtype == torch.float8_e4m3fn
    tile = choose_box_tile(
        shape, dtype.itemsize, target, projection, fp8=fp8, residual=boxes.residual
    )
    scales: dict[str, Any] = {"scale": meta(shape.k, dtype=torch.float32)}
    if boxes.residual:
        scales["residual_scale"] = 0.125
    if projection is not None:
        scales["scale2"] = meta(shape.k, dtype=torch.float32)
    x, kind = meta(n, shape.h, shape.w, shape.c, dtype=dtype), TYPES[dtype]
    kind = "tf32" if dtype == torch.float32 else kind
    names = {False: ("", ".sum"), True: (".last",)} if tile.split_k > 1 else {False: ("",)}
    for last_adds, parts in names.items():
        tile = replace(tile, last_adds=last_adds)
        launches = conv2d_tma_launches(
            x,
            meta(shape.k, depth, dtype=dtype),
            meta(shape.k, dtype=torch.float32),
            meta(*y_sizes, dtype=dtype) if boxes.residual else None,
            meta(*y_sizes, dtype=dtype),
            shape=shape,
            target=target,
            x2=x2,
            stride2=(1, 1) if projection is None else projection.stride,
            activation="relu",
            tile=tile,
            allow_tf32=dtype == torch.float32,
            **new_parts(shape, tile, x, projection),
            **(scales if is_bytes(dtype) else {}),
        )
        for launch, part in zip(launches, parts, strict=True):
            launch = launch.rounded() if kind == "tf32" else launch
            yield CompileCase(f"{name}.boxes{part}-b{n}-{kind}", launch)


def meta(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(sizes, dtype=dtype, device="meta")
