"""Launches for the tests of compiled kernels, on any device; loaded by path, not collected."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.kernels.conv2d import conv2d_launch, conv2d_tma_launches
from fastres.kernels.cost import Target
from fastres.kernels.geometry import ConvShape, PoolShape
from fastres.kernels.launch import Launch
from fastres.kernels.pool import max_pool_launch
from fastres.kernels.tiles import BoxTile, ConvTile

BOX = [2, 4, 8, 64]


@triton.jit
def _box_copy_kernel(x_desc, scale, offset, y_desc, TILES_H: tl.constexpr, WAIT: tl.constexpr):
    """y = scale·x + offset, box by box; the numbers between the descriptors are on purpose."""
    if WAIT:
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(0) // TILES_H * 2
    h = tl.program_id(0) % TILES_H * 4
    v = x_desc.load([n, h, 0, 0]).to(tl.float32) * scale + offset
    y_desc.store([n, h, 0, 0], v.to(y_desc.dtype))


def conv2d(device: str, *, bias: bool, residual: bool, dtype=torch.float16) -> Launch:
    """A 3×3 with stride 2 and a tile whose shared memory a block does not get unasked."""
    x = _random(device, 2, 14, 14, 64, dtype=dtype)
    weight = _random(device, 96, 3, 3, 64, dtype=dtype)
    y = _random(device, 2, 7, 7, 96, dtype=dtype)
    return conv2d_launch(
        x,
        weight,
        _random(device, 96, dtype=torch.float32) if bias else None,
        _random(device, 2, 7, 7, 96, dtype=dtype) if residual else None,
        torch.empty_like(y),
        shape=ConvShape(2, 14, 14, 64, 96, 3, 3, (2, 2), (1, 1)),
        activation="relu",
        tile=ConvTile(128, 64, 64, 4, 3),
        target=Target.typical(90),
    )


def conv2d_far(device: str) -> Launch:
    """A 1×1 whose images lie further apart than 32 bits count; there is one only."""
    x = _random(device, 1, 8, 8, 64).as_strided((1, 8, 8, 64), (2**31, 512, 64, 1))
    y = torch.empty_like(_random(device, 1, 8, 8, 32))
    shape = ConvShape(1, 8, 8, 64, 32, 1, 1)
    weight = _random(device, 32, 1, 1, 64)
    return conv2d_launch(x, weight, None, None, y, shape=shape, target=Target.typical(90))


def conv2d_int8(device: str) -> Launch:
    """Scales as a vector and as numbers, and no fused arithmetic."""
    x, weight = (_random(device, *v, 64, dtype=torch.int8) for v in ((2, 14, 14), (96, 3, 3)))
    y = _random(device, 2, 14, 14, 96, dtype=torch.int8)
    return conv2d_launch(
        x,
        weight,
        None,
        _random(device, 2, 14, 14, 96, dtype=torch.int8),
        torch.empty_like(y),
        shape=ConvShape(2, 14, 14, 64, 96, 3, 3, (1, 1), (1, 1)),
        activation="relu",
        scale=_random(device, 96, dtype=torch.float32),
        residual_scale=0.125,
        out_scale=3.0,
        target=Target.typical(90),
    )


def boxes_int8(device: str) -> Launch:
    """Descriptors of int8, and an out_scale of 1 that is compiled out."""
    x, weight = (_random(device, *v, 64, dtype=torch.int8) for v in ((2, 8, 8), (128,)))
    (launch,) = conv2d_tma_launches(
        x,
        weight,
        None,
        None,
        torch.empty_like(_random(device, 2, 8, 8, 128, dtype=torch.int8)),
        shape=ConvShape(2, 8, 8, 64, 128, 1, 1),
        scale=_random(device, 128, dtype=torch.float32),
        tile=BoxTile(1, 1, 128, 64, 64, 4, 2),
        target=Target.typical(90),
    )
    return launch


def max_pool(device: str) -> Launch:
    x = _random(device, 1, 15, 15, 24)
    y = torch.empty_like(_random(device, 1, 8, 8, 24))
    return max_pool_launch(x, y, shape=PoolShape(1, 15, 15, 24, (3, 3), (2, 2), (1, 1)))


def box_copy(device: str, *, dtype=torch.float16, dependent: bool = False, **options) -> Launch:
    """3 images of 6 rows: boxes overhang in both; offset 1 is a number that is compiled in.

    The fp32 output makes the compiler treat the two descriptors differently.
    """
    x = _random(device, 3, 6, 8, 64, dtype=dtype)
    y = torch.empty_like(x, dtype=torch.float32)
    return Launch(
        kernel=_box_copy_kernel,
        programs=4,
        arguments={
            "x_desc": TensorDescriptor.from_tensor(x, BOX, **options),
            "scale": 0.5,
            "offset": 1,
            "y_desc": TensorDescriptor.from_tensor(y, BOX),
        },
        constants={"TILES_H": 2, "WAIT": dependent},
        num_warps=4,
        num_stages=1,
        dependent=dependent,
    )


@dataclass(frozen=True)
class Case:
    name: str
    launch: Callable[[str], Launch]  # for a device


CASES = (
    Case("conv2d", lambda device: conv2d(device, bias=False, residual=False)),
    Case("conv2d-bias-residual", lambda device: conv2d(device, bias=True, residual=True)),
    Case("conv2d-64-bit-stride", conv2d_far),
    Case("conv2d-int8", conv2d_int8),
    Case("boxes-int8", boxes_int8),
    Case("max-pool", max_pool),
    Case("box-copy", box_copy),
    Case("box-copy-bf16-nan", lambda device: box_copy(device, dtype=torch.bfloat16, padding="nan")),
    Case("box-copy-dependent", lambda device: box_copy(device, dependent=True)),
)
if hasattr(TensorDescriptor, "round_f32_to_tf32"):  # not in Triton 3.6
    rounded = {"dtype": torch.float32, "round_f32_to_tf32": True}
    CASES += (Case("box-copy-tf32", lambda device: box_copy(device, **rounded)),)


def _random(device: str, *sizes: int, dtype=torch.float16) -> torch.Tensor:
    if device == "meta":
        return torch.empty(sizes, dtype=dtype, device=device)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
