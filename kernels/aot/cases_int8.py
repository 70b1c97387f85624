"""The launches of 8 bits worth compiling for every target: ResNet-50's kinds of layers."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from fastres.kernels.aot.cases import CompileCase, boxes_cases, chain_case, conv2d_case, meta
from fastres.kernels.aot.compiling import TYPES
from fastres.kernels.aot.layers import BOXES, CHAINS, CLASSIFIER, CONV_1X1, CONV_3X3, LAYERS, STEM
from fastres.kernels.cost import Target
from fastres.kernels.elementwise import elementwise_launch
from fastres.kernels.folding import packed_shape
from fastres.kernels.geometry import PoolShape
from fastres.kernels.layout import to_nchw_launch, to_nhwc_launch
from fastres.kernels.linear import global_avg_pool_launch
from fastres.kernels.pool import max_pool_launch
from fastres.kernels.space_to_depth import space_to_depth_launch
from fastres.kernels.stem import stem_launch
from fastres.kernels.stem_pool import stem_pool_launch

INT8, FP8, HALF = torch.int8, torch.float8_e4m3fn, torch.float16


def byte_cases(sm: int) -> Iterator[CompileCase]:
    """Every family's cases for one target: int8, and fp8 where the target has it."""
    yield from conv2d_cases(sm)
    yield from conv2d_tma_cases(sm)
    yield from chain_cases(sm)
    yield from layout_cases()
    yield from stem_cases(sm)
    yield from head_cases()


def conv2d_cases(sm: int) -> Iterator[CompileCase]:
    """ResNet-50's kinds of convolution over pointers, with a classifier that gives floats."""
    target = Target.typical(sm)
    for layer in LAYERS:
        if layer not in (STEM, CLASSIFIER):
            yield conv2d_case(layer, 256, INT8, target)
    for layer in (CONV_3X3, CONV_1X1):
        yield conv2d_case(layer, 1, INT8, target)
        if sm >= 89:
            yield conv2d_case(layer, 256, FP8, target)
    for batch in (256, 1):
        yield conv2d_case(CLASSIFIER, batch, INT8, target, out_dtype=HALF)


def conv2d_tma_cases(sm: int) -> Iterator[CompileCase]:
    """ResNet-50's convolutions after the stem at batch 256 and 1; none below sm_90."""
    if sm < 90:
        return
    for name, boxes in BOXES.items():
        for n in (256, 1):
            yield from boxes_cases(name, boxes, n, INT8, sm)
        yield from boxes_cases(name, boxes, 256, FP8, sm)


def chain_cases(sm: int) -> Iterator[CompileCase]:
    """The boundaries of ResNet-50's first two stages; none below sm_90."""
    if sm < 90:
        return
    for name, shape in CHAINS.items():
        yield chain_case(name, replace(shape, n=256), INT8, sm)
    for name in ("layer1.0", "layer1.1", "layer2.1"):
        yield chain_case(name, replace(CHAINS[name], n=256), FP8, sm)
        yield chain_case(name, replace(CHAINS[name], n=1), INT8, sm)


def layout_cases() -> Iterator[CompileCase]:
    """Pictures of bytes on their way in, and int8 maps both ways."""
    rgb = meta(256, 224, 224, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    normalise = meta(2, 3, dtype=torch.float32)
    packed = meta(*packed_shape(256, 224, 224), dtype=INT8)
    launch = space_to_depth_launch(rgb, packed, normalise=normalise, out_scale=48.5)
    yield CompileCase("conv1.fold-bytes-b256-i8", launch)
    floats = meta(256, 64, 56, 56, dtype=torch.float32)
    nhwc = meta(256, 56, 56, 64, dtype=INT8)
    yield CompileCase("map.to_nhwc-b256-i8", to_nhwc_launch(floats, nhwc, out_scale=48.5))
    yield CompileCase("map.to_nchw-b256-i8", to_nchw_launch(nhwc, floats, scale=0.02))


def stem_cases(sm: int) -> Iterator[CompileCase]:
    """The folded stem, with its pool and without, at batch 256 and 1."""
    target = Target.typical(sm)
    scales: dict[str, Any] = {"scale": meta(64, dtype=torch.float32)}
    for dtype, n in ((INT8, 256), (INT8, 1), (FP8, 256)):
        if dtype == FP8 and sm < 89:
            continue
        packed = meta(*packed_shape(n, 224, 224), dtype=dtype)
        weight, bias = meta(64, 256, dtype=dtype), meta(64, dtype=torch.float32)
        out = meta(n, 112, 112, 64, dtype=dtype)
        launch = stem_launch(packed, weight, bias, out, target=target, **scales)
        yield CompileCase(f"conv1.folded-b{n}-{TYPES[dtype]}", launch)
        pooled = meta(n, 56, 56, 64, dtype=dtype)
        launch = stem_pool_launch(packed, weight, bias, pooled, **scales)
        yield CompileCase(f"conv1.folded+maxpool-b{n}-{TYPES[dtype]}", launch)


def head_cases() -> Iterator[CompileCase]:
    """Pools, and a sum of int8 maps each with a scale of its own."""
    shape = PoolShape(256, 112, 112, 64, (3, 3), (2, 2), (1, 1))
    x, y = meta(256, 112, 112, 64, dtype=INT8), meta(256, 56, 56, 64, dtype=INT8)
    yield CompileCase("maxpool-b256-i8", max_pool_launch(x, y, shape=shape))
    x = meta(256, 7, 7, 2048, dtype=INT8)
    for dtype in (INT8, torch.float32):
        launch = global_avg_pool_launch(x, meta(256, 2048, dtype=dtype), scale=0.02)
        yield CompileCase(f"avgpool-b256-i8-to-{TYPES[dtype]}", launch)
    x, r, y = (meta(256, 56, 56, 256, dtype=INT8) for _ in range(3))
    factors: dict[str, Any] = {"x_scale": 0.02, "residual_scale": 0.03, "out_scale": 48.5}
    launch = elementwise_launch(x, y, residual=r, activation="relu", **factors)
    yield CompileCase("add_relu-b256-i8", launch)
