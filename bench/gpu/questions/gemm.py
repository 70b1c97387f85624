"""Questions that one small matrix product answers: the layout of its operands, the rate at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.gpu.questions.case import Case, Library
from bench.gpu.questions.kernels import shifted_gemm
from bench.kernels.posed import Posed, difference, normal, poisoned
from fastres.kernels.launch import Launch

LAYOUTS = ("transposed", "pixels first", "registers")
Tile = tuple[int, int, int, int, int]  # BLOCK_M, BLOCK_N, BLOCK_K, warps, stages
# RMS errors: one rounding to fp16 and some; fp8 products are added up in fewer bits than fp32's
_TOLERANCE = {torch.float16: 1e-3, torch.int8: 1e-3, torch.float8_e4m3fn: 2e-2}
_INT8_SCALE = 2.0**-20  # keeps sums of 4096 products within fp16
_CHECKED = 64  # rows compared with float64, from each end


def peaks(small: bool) -> Iterator[Case]:
    """One large product of random data: 32768 rows, 4096 deep, 2048 columns (fit into L2)."""
    m, c, k = (144, 256, 256) if small else (32768, 4096, 2048)
    kinds = {"fp16": torch.float16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
    for kind, dtype in kinds.items():
        if small and kind == "fp8":
            continue  # Triton's interpreter has no fp8 that can be relied on
        depth = 128 // dtype.itemsize
        for tile in ((128, 256, depth, 8, 3), (256, 128, depth, 8, 3), (128, 128, depth, 8, 4)):
            pose = partial(_pose, m, c, k, 1, 0, "pixels first", tile, dtype)
            yield Case(f"peak: {kind}", _text(tile), pose, flops=2.0 * m * c * k)
        pose = partial(_pose_library, m, c, k, dtype)
        yield Case(f"peak: {kind}, PyTorch's", "", pose, flops=2.0 * m * c * k)


def layouts(small: bool) -> Iterator[Case]:
    """Convolutions of ResNet-50 at batch 256 with pixels as second operand, or as first.

    Pictures of a 3x3 bring a border, and what is computed there counts as work in every layout.
    """
    sizes = ((56, 64, 64, 9), (28, 128, 128, 9), (14, 256, 256, 9), (7, 512, 512, 9))
    sizes += ((56, 64, 256, 1), (56, 256, 64, 1), (28, 128, 512, 1))
    sizes += ((14, 1024, 256, 1), (7, 512, 2048, 1))
    for side, c, k, taps in sizes:
        row = side + 2 if taps == 9 else side
        narrow = ((128, 64, 64, 4, 4), (256, 64, 64, 8, 3))
        wide = ((128, 128, 64, 8, 4), (128, 128, 64, 4, 3))
        for tile in narrow if k == 64 else wide:
            asked = (tile[0] + 16, 64, tile[1]) if small else (256 * row * row, c, k)
            for layout in LAYOUTS:
                yield Case(
                    f"layout: {'3x3' if taps == 9 else '1x1'} {side}x{side} {c}->{k}, {layout}",
                    _text(tile),
                    partial(_pose, *asked, taps, 10 if small else row, layout, tile, torch.float16),
                    flops=2.0 * math.prod(asked) * taps,
                    bytes=2.0 * asked[0] * (asked[1] + asked[2]),
                )


def _text(tile: Tile) -> str:
    m, n, k, warps, stages = tile
    return f"{m}x{n}x{k} w{warps} s{stages}"


def _pose(
    m: int,
    c: int,
    k: int,
    taps: int,
    row: int,
    layout: str,
    tile: Tile,
    dtype: torch.dtype,
    device: torch.device,
) -> Posed:
    block_m, block_n, block_k, warps, stages = tile
    x, w = normal(device, m, c, dtype=dtype), normal(device, k, taps * c, dtype=dtype)
    y, scale = poisoned(device, m, k), _INT8_SCALE if dtype == torch.int8 else 1.0
    pixels = TensorDescriptor.from_tensor(x, [block_m, block_k])
    if layout == "registers":
        pixels = TensorDescriptor.from_tensor(x[:, None], [block_m, 1, block_k])
    launch = Launch(
        shifted_gemm,
        -(-m // block_m) * (k // block_n),
        {
            "x": pixels,
            "w": TensorDescriptor.from_tensor(w, [block_n, block_k]),
            "y": TensorDescriptor.from_tensor(y, [block_m, block_n]),
            "SCALE": scale,
        },
        {
            "C": c,
            "K": k,
            "TAPS": taps,
            "ROW": row,
            "LAYOUT": layout,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        num_warps=warps,
        num_stages=stages,
    )
    return Posed([launch], lambda: _wrong(x, w, y, taps, row, scale))


def _pose_library(m: int, c: int, k: int, dtype: torch.dtype, device: torch.device) -> Posed:
    x, w = normal(device, m, c, dtype=dtype), normal(device, k, c, dtype=dtype)
    y = poisoned(device, m, k)
    call: Callable[[], object] = partial(torch.mm, x, w.T, out=y)
    if dtype == torch.int8:
        y = torch.full((m, k), -1, dtype=torch.int32, device=device)
        call = partial(torch._int_mm, x, w.T, out=y)
    elif dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=device)
        more = {"out_dtype": y.dtype, "use_fast_accum": True, "out": y}
        call = partial(torch._scaled_mm, x, w.T, one, one, **more)
    return Posed([Library(call, [x, w, y])], lambda: _wrong(x, w, y, 1, 0, 1.0))


def _wrong(x: Tensor, w: Tensor, y: Tensor, taps: int, row: int, scale: float) -> str | None:
    """y beside float64: all of it for what was not written, rows from both ends for values."""
    if bool(torch.isnan(y).any()):
        return "elements that were not written, or NaN"
    (m, c), weight = x.shape, w.float().double() * scale
    for first in (0, m - _CHECKED):
        exact = weight.new_zeros(_CHECKED, len(w))
        for tap in range(taps):
            start = first + tap // 3 * row + tap % 3
            pixels = x[start : start + _CHECKED].float().double()
            exact[: len(pixels)] += pixels @ weight[:, tap * c : (tap + 1) * c].T
        found = difference(y[first : first + _CHECKED], exact, _TOLERANCE[x.dtype])
        if found is not None:
            return found
    return None
