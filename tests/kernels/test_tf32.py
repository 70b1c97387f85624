"""Rounding to TF32: the numbers themselves, and that each kernel rounds what it stores."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastres.kernels import reference
from fastres.kernels.aot import compile_launch
from fastres.kernels.conv2d import conv2d_launch, conv2d_tma_launches
from fastres.kernels.conv2d.split_k import sum_parts_launch
from fastres.kernels.cost import Target
from fastres.kernels.elementwise import elementwise_launch
from fastres.kernels.folding import packed_shape
from fastres.kernels.geometry import ConvShape, PoolShape
from fastres.kernels.launch import Launch
from fastres.kernels.layout import to_nhwc_launch
from fastres.kernels.linear import global_avg_pool_launch
from fastres.kernels.pool import avg_pool_launch, max_pool_launch
from fastres.kernels.space_to_depth import space_to_depth_launch
from fastres.kernels.stem import stem_launch
from fastres.kernels.stem_pool import stem_pool_launch
from fastres.kernels.tiles import BoxTile

HOPPER = Target.typical(90)
Make = Callable[..., torch.Tensor]  # normal values of a shape, of a dtype


def numbers() -> torch.Tensor:
    """Normal and subnormal numbers of all sizes, ties, neighbours of ties, and what is no number"""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**31), 2**31, (4096,), generator=generator).to(torch.int32)
    tops = torch.arange(-40, 40, dtype=torch.int32) * 0x2000 + 0x3F800000
    ties = torch.cat([tops + low for low in (0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF)])
    odd = [0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFFFF, 0x800000]
    odd += [0x7F7FDFFF, 0x7F7FE000, 0x7F7FEFFF, 0x7F7FF000, 0x7F7FFFFF]  # up to the largest
    odd += [0x7F800000, 0x7FC00000, 0x7FC00001, 0x7FFFFFFF]  # infinity and NaN
    bits = torch.cat([drawn, ties, torch.tensor(odd, dtype=torch.int32)])
    return torch.cat([bits, bits | -(2**31)]).view(torch.float32)


def oracle(x: torch.Tensor) -> torch.Tensor:
    """The same in float64: multiples of the step at a number's own exponent, ties to even."""
    wide = x.double().numpy()
    largest = (2 - 2.0**-10) * 2.0**127
    with np.errstate(invalid="ignore"):
        _, exponent = np.frexp(wide)
        step = np.ldexp(1.0, np.maximum(exponent - 11, -126 - 10))
        nearest = np.rint(wide / step) * step
    kept = ~np.isfinite(wide) | (np.abs(nearest) > largest)
    return torch.from_numpy(np.where(kept, wide, nearest))


def test_the_reference_is_the_nearest_number_of_ten_bits() -> None:
    x = numbers()
    y = reference.round_tf32(x)
    torch.testing.assert_close(y.double(), oracle(x), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(y), torch.signbit(x))
    assert torch.equal(y.isfinite(), x.isfinite()) and torch.equal(y.isnan(), x.isnan())
    assert torch.equal(reference.round_tf32(y).view(torch.int32), y.view(torch.int32))
    assert y.view(torch.int32)[x.abs() < 3.4e38].bitwise_and(0x1FFF).eq(0).all()


def test_strides_are_kept() -> None:
    x = torch.randn(2, 3, 4, 5).permute(0, 2, 3, 1)
    assert torch.equal(reference.round_tf32(x), reference.round_tf32(x.contiguous()))
    assert reference.round_tf32(x).stride() == x.stride()


def test_what_tensor_cores_see_of_the_largest_is_finite() -> None:
    x = torch.tensor([3.4028234e38, -3.4028234e38])
    cut = (reference.round_tf32(x).view(torch.int32) & -0x2000).view(torch.float32)
    assert cut.isfinite().all() and cut[0] == (2 - 2.0**-10) * 2.0**127


def test_kernels_round_as_the_reference(device, guarded, poisoned) -> None:
    x = numbers()
    x = guarded(x[: len(x) // 8 * 8].view(-1, 8).to(device))
    out = poisoned(x.shape, x.dtype, device)
    elementwise_launch(x, out).rounded().run()
    found, expected = out.cpu(), reference.round_tf32(x.cpu())
    numeric = ~expected.isnan()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.view(torch.int32)[numeric], expected.view(torch.int32)[numeric])


def conv2d(make: Make) -> tuple[list[Launch], torch.Tensor]:
    shape, out = ConvShape(2, 5, 5, 32, 16, 3, 3, (1, 1), (1, 1)), make(2, 5, 5, 16)
    operands = make(2, 5, 5, 32), make(16, 3, 3, 32), make(16), make(2, 5, 5, 16), out
    more = {"shape": shape, "target": HOPPER, "activation": "relu", "allow_tf32": True}
    return [conv2d_launch(*operands, **more)], out


def boxes(make: Make, split_k: int = 1) -> tuple[list[Launch], torch.Tensor]:
    shape, out = ConvShape(2, 8, 8, 32, 64, 1, 1), make(2, 8, 8, 64)
    tile = BoxTile(1, 8, 8, 64, 16, split_k=split_k, num_warps=4, num_stages=2)
    launches = conv2d_tma_launches(
        make(2, 8, 8, 32),
        make(64, 32),
        make(64),
        make(2, 8, 8, 64),
        out,
        shape=shape,
        target=HOPPER,
        tile=tile,
        workspace=make(split_k * out.numel()),
        allow_tf32=True,
    )
    assert len(launches) == min(split_k, 2)
    return list(launches), out


def split_boxes(make: Make) -> tuple[list[Launch], torch.Tensor]:
    return boxes(make, 2)


def sum_parts(make: Make) -> tuple[list[Launch], torch.Tensor]:
    out = make(5, 24)
    return [sum_parts_launch(make(3, 5, 24), make(24), make(5, 24), out)], out


def stem(make: Make) -> tuple[list[Launch], torch.Tensor]:
    out = make(1, 6, 8, 16)
    operands = make(*packed_shape(1, 12, 16)), make(16, 256), make(16), out
    return [stem_launch(*operands, target=HOPPER, allow_tf32=True)], out


def folding(make: Make) -> tuple[list[Launch], torch.Tensor]:
    out = make(*packed_shape(2, 6, 8))
    return [space_to_depth_launch(make(2, 3, 6, 8), out, normalise=make(2, 3))], out


def layout(make: Make) -> tuple[list[Launch], torch.Tensor]:
    out = make(2, 6, 8, 4)
    return [to_nhwc_launch(make(2, 3, 6, 8, dtype=torch.uint8), out, normalise=make(2, 3))], out


def elementwise(make: Make) -> tuple[list[Launch], torch.Tensor]:
    out = make(2, 4, 4, 8)
    more = {"scale": make(8), "shift": make(8), "residual": make(2, 4, 4, 8)}
    return [elementwise_launch(make(2, 4, 4, 8), out, **more)], out


def max_pool(make: Make) -> tuple[list[Launch], torch.Tensor]:
    out, shape = make(2, 3, 3, 8), PoolShape(2, 6, 6, 8, (3, 3), (2, 2), (1, 1))
    return [max_pool_launch(make(2, 6, 6, 8), out, shape=shape)], out


def avg_pool(make: Make) -> tuple[list[Launch], torch.Tensor]:
    out, shape = make(2, 3, 3, 8), PoolShape(2, 6, 6, 8, (3, 3), (2, 2), (1, 1))
    return [avg_pool_launch(make(2, 6, 6, 8), out, shape=shape)], out


def global_avg_pool(make: Make) -> tuple[list[Launch], torch.Tensor]:
    out = make(2, 8)
    return [global_avg_pool_launch(make(2, 5, 5, 8), out)], out


FAMILIES = (
    conv2d,
    boxes,
    split_boxes,
    sum_parts,
    stem,
    folding,
    layout,
    elementwise,
    max_pool,
    avg_pool,
    global_avg_pool,
)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_every_kernel_rounds_what_it_stores(family, device, poisoned) -> None:
    generator = torch.Generator().manual_seed(0)

    def make(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        values = torch.randn(sizes, generator=generator)
        return (50 * values.abs()).to(device, dtype) if dtype == torch.uint8 else values.to(device)

    launches, out = family(make)
    found = []
    for rounding in (False, True):
        out.fill_(float("nan"))
        for launch in launches:
            (launch.rounded() if rounding else launch).run()
        found.append(out.clone())
    whole, rounded = found
    assert torch.equal(rounded, reference.round_tf32(whole)) and not torch.equal(rounded, whole)


def test_other_types_are_not_rounded_to_tf32() -> None:
    """A stem with its pool is none of fp32's kernels."""
    x = torch.empty(packed_shape(1, 12, 16), dtype=torch.float16, device="meta")
    weight, out = x.new_empty(16, 256), x.new_empty(1, 3, 4, 16)
    with pytest.raises(ValueError, match="_stem_pool_kernel does not round to TF32"):
        stem_pool_launch(x, weight, None, out).rounded()


@pytest.mark.compile
@pytest.mark.parametrize("sm", [80, 90, 100, 120])
def test_a_rounded_number_takes_six_instructions(sm: int) -> None:
    x = torch.empty(4096, 64, device="meta")
    launch = elementwise_launch(x, torch.empty_like(x))
    plain, rounded = (compile_launch(each, sm) for each in (launch, launch.rounded()))
    counts = [sum(n for k, n in f.instructions.items() if k != "NOP") for f in (plain, rounded)]
    values = launch.constants["BLOCK_M"] * launch.constants["BLOCK_C"] // (32 * launch.num_warps)
    assert 5 * values <= counts[1] - counts[0] <= 7 * values
    assert rounded.spill_stores == 0
