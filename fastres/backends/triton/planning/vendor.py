"""PyTorch's own fused convolution, which is cuDNN's: one launch, never taken unmeasured.

It gives its result memory of its own, in a recording that of the graph, so nothing is copied. How
it computes is left to cuDNN's rules of thumb, not to timing: a recording forbids that, and another
process would get other bits. Source: ConvShared.cpp and Conv_v8.cpp of PyTorch (aten, cudnn).
Imports no triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastres.kernels.cost import Cost
from fastres.kernels.geometry import ConvShape, Pair
from fastres.options import Precision

PRECISIONS: tuple[Precision, ...] = ("fp16", "bf16")


@dataclass(frozen=True)
class VendorTile:
    """What a form of ours has a tile for: by what, and on which GPU, it was measured.

    Args:
        library: as `library` names it; anywhere else the measurement counts for nothing.
    """

    library: str

    def __str__(self) -> str:
        return self.library


def library(device: torch.device) -> str | None:
    """The vendor's library, its version, PyTorch's and the GPU; None where there is none, or where
    the process is to do without (`torch.backends.cudnn.enabled`)."""
    if device.type != "cuda" or not torch.backends.cudnn.enabled:
        return None
    version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    if version is None:
        return None
    gpu = torch.cuda.get_device_name(device)
    return f"cuDNN {version} of PyTorch {torch.__version__} on {gpu}"


def vendor_cost(shape: ConvShape, itemsize: int, *, residual: bool) -> Cost:
    """Its products and compulsory traffic, as of `fastres.kernels.conv2d`, which needs triton.

    Args:
        itemsize: bytes of an element.
        residual: whether a tensor is added.
    """
    gemm = shape.gemm
    elements = shape.n * shape.h * shape.w * shape.c + shape.k * gemm.k
    elements += gemm.m * shape.k * (2 if residual else 1)
    return Cost(2 * gemm.m * shape.k * gemm.k, elements * itemsize)


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> torch.Tensor:
    """y = relu(conv(x, w) + b + r), NHWC, in new memory.

    Args:
        x: [N, H, W, C], fp16 or bf16, packed, as all others.
        weight: [K, R, S, C/groups].
        bias: [K], of the same type.
        residual: [N, P, Q, K].

    Returns:
        [N, P, Q, K].

    Raises:
        RuntimeError: cuDNN does not take it, or gives another layout.
    """
    planes, filters = _planes(x), _planes(weight)  # in channels_last, as they lie: no copies
    windows = stride, padding, dilation, groups
    with _by_rules_of_thumb():
        if residual is None:
            y = torch.cudnn_convolution_relu(planes, filters, bias, *windows)
        else:
            added = _planes(residual)
            y = torch.cudnn_convolution_add_relu(planes, filters, added, 1.0, bias, *windows)
    result = y.permute(0, 2, 3, 1)
    if not result.is_contiguous():
        raise RuntimeError(f"the result has strides {y.stride()}, expected channels last")
    return result


def _planes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(0, 3, 1, 2)


@contextmanager
def _by_rules_of_thumb() -> Iterator[None]:
    """Without cudnn.benchmark, a setting of the process that these calls read; others stay."""
    cudnn = torch.backends.cudnn
    if not cudnn.benchmark:
        yield
        return
    cudnn.set_flags(_benchmark=False, _fp32_precision=None)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        cudnn.set_flags(_benchmark=True, _fp32_precision=None)  # type: ignore[no-untyped-call]
