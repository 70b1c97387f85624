"""NaN and infinities reach what PyTorch says, past stored zeros that are no taps of a filter."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from fastres.kernels.conv2d import conv2d_launch
from fastres.kernels.cost import Target
from fastres.kernels.folding import pack_stem_weight
from fastres.kernels.geometry import ConvShape
from fastres.kernels.space_to_depth import space_to_depth
from fastres.kernels.stem import stem
from fastres.kernels.stem_pool import stem_pool
from fastres.kernels.tiles import ConvTile, StemPoolTile

# numpy of what the interpreter computes: infinity * 0, and infinity - infinity
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
NAN, INF = float("nan"), float("inf")
VALUES = (NAN, INF, -INF)


def assert_as_pytorch(found: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN and either infinity at the same places, and close elsewhere; both [N, C, H, W]."""
    found = found.cpu().double()
    for what in VALUES:
        places = [v.isnan() if what != what else v == what for v in (found, expected)]
        assert torch.equal(*places), f"{what} at {places[0].sum()} places, not {places[1].sum()}"
    finite = expected.isfinite()
    assert 0 < finite.sum() < finite.numel()
    torch.testing.assert_close(found[finite], expected[finite], rtol=2e-2, atol=4e-2)


def pictures(channels: int, size: int, channel: int) -> torch.Tensor:
    """One for each value, at corners, edges and in the middle; one with all; one with none."""
    x = torch.randn(5, channels, size, size, generator=torch.Generator().manual_seed(0))
    # at rows and columns that are even as well as odd: a folded filter's zeros lie on even ones
    for i, h in enumerate((0, size // 2, size - 1)):
        for j, w in enumerate((0, size // 2 - 1, size - 2)):
            x[(0, 1, 2), channel, h, w] = torch.tensor(VALUES)
            x[3, channel, h, w] = VALUES[(i + j) % 3]
    x[3, channel, 2, 2] = -INF  # near another infinity: both are in one sum
    return x


def stem_operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures, a filter with zeros that are taps, and what PyTorch makes of them."""
    x = pictures(3, 28, 1).to(dtype)
    weight = torch.randn(3, 3, 7, 7, generator=torch.Generator().manual_seed(1)) / 12
    weight[1, :, ::2] = 0.0
    weight[2] = 0.0
    weight = weight.to(dtype)
    return x, weight, F.conv2d(x.double(), weight.double(), None, 2, 3)


@pytest.mark.parametrize("dtype", [HALF, BF16, FP32], ids=["fp16", "bf16", "fp32"])
def test_stem(dtype, device):
    x, weight, expected = stem_operands(dtype)
    packed = space_to_depth(x.to(device), dtype=dtype)
    tile = ConvTile(256, 16, 64, 4, 2)
    y = stem(packed, pack_stem_weight(weight).to(device), activation=None, tile=tile)
    assert_as_pytorch(y.permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=["fp16", "bf16"])
def test_stem_and_pool(dtype, device):
    x, weight, expected = stem_operands(dtype)
    packed = space_to_depth(x.to(device), dtype=dtype)
    tile = StemPoolTile(8, 8, 16, 4, 2)  # a picture is one block
    y = stem_pool(packed, pack_stem_weight(weight).to(device), activation=None, tile=tile)
    assert_as_pytorch(y.permute(0, 3, 1, 2), F.max_pool2d(expected, 3, 2, 1))


def test_stem_and_pool_where_blocks_meet(device):
    """What two blocks see, each finds for itself."""
    x = torch.randn(1, 3, 28, 32, generator=torch.Generator().manual_seed(0))
    x[0, 2, 12, 12], x[0, 0, 13, 18] = NAN, INF
    weight = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(1)) / 12
    expected = F.conv2d(x.half().double(), weight.half().double(), None, 2, 3)
    tile = StemPoolTile(4, 4, 16, 4, 2)
    packed, matrix = space_to_depth(x.to(device)), pack_stem_weight(weight).half().to(device)
    y = stem_pool(packed, matrix, activation=None, tile=tile)
    assert_as_pytorch(y.permute(0, 3, 1, 2), F.max_pool2d(expected, 3, 2, 1))


@dataclass(frozen=True)
class Case:
    name: str
    c: int = 3  # input channels of a group
    k: int = 2  # output channels of a group
    groups: int = 8
    merged: int = 4
    taps: int = 3
    stride: int = 2
    dilation: int = 1
    dtype: torch.dtype = HALF
    tile: ConvTile = ConvTile(64, 16, 32, 4, 2)
    allow_tf32: bool = False


CASES = (
    Case("fp16"),
    Case("bf16", dtype=BF16),
    Case("fp32", dtype=FP32),
    Case("tf32", dtype=FP32, allow_tf32=True),
    Case("in-one-tap", c=4, tile=ConvTile(64, 16, 16, 4, 2)),
    Case("all", merged=8, groups=8, c=2),
    Case("pointwise", taps=1, stride=1),
    Case("dilated", dilation=2, stride=1, merged=2, groups=4),
    Case("channel-blocks", k=6, groups=4, merged=4),
)


def block_diagonal(weight: torch.Tensor, case: Case) -> torch.Tensor:
    """[K, R, S, merged * C/groups] of [K, C/groups, R, S], zeros for the others' channels."""
    whole = weight.new_zeros(*weight.shape[:1], case.taps, case.taps, case.merged * case.c)
    for k, filters in enumerate(weight):
        first = k // case.k % case.merged * case.c
        whole[k, :, :, first : first + case.c] = filters.permute(1, 2, 0)
    return whole


def convolved(x: torch.Tensor, weight: torch.Tensor, case: Case) -> torch.Tensor:
    """[N, K, P, Q] of an NHWC x."""
    pad, steps = case.dilation * (case.taps // 2), (case.stride, case.stride)
    n, h, w, c = x.shape
    sizes = (n, h, w, c, case.groups * case.k, case.taps, case.taps, steps, (pad, pad))
    shape = ConvShape(*sizes, (case.dilation, case.dilation), case.groups // case.merged)
    out = torch.empty((n, shape.p, shape.q, shape.k), dtype=x.dtype, device=x.device)
    conv2d_launch(
        x,
        block_diagonal(weight, case).to(x.device),
        None,
        None,
        out,
        shape=shape,
        target=Target.typical(90),
        merged=case.merged,
        tile=case.tile,
        allow_tf32=case.allow_tf32,
    ).run()
    return out.permute(0, 3, 1, 2)


def grouped_operands(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """NHWC pixels, a filter with zeros that are taps, and what PyTorch makes of them."""
    x = pictures(case.groups * case.c, 9, 2 * case.c - 1).to(case.dtype)
    sizes = (case.groups * case.k, case.c, case.taps, case.taps)
    weight = torch.randn(sizes, generator=torch.Generator().manual_seed(1)) / 4
    weight[case.k, :, :, 0] = 0.0  # of the group that sees NaN and infinities
    weight = weight.to(case.dtype)
    pad = case.dilation * (case.taps // 2)
    options = (case.stride, pad, case.dilation, case.groups)
    expected = F.conv2d(x.double(), weight.double(), None, *options)
    return x.permute(0, 2, 3, 1).contiguous(), weight, expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_merged_groups(case, device, guarded):
    x, weight, expected = grouped_operands(case)
    assert_as_pytorch(convolved(guarded(x.to(device)), weight, case), expected)


def test_what_sees_neither_keeps_every_bit(device):
    """A picture's result does not hang on what else is in its block."""
    case = Case("bits")
    x, weight, expected = grouped_operands(case)
    alone = torch.where(x.isfinite(), x, 0.0)
    y, clean = (convolved(v.to(device), weight, case) for v in (x, alone))
    unseen = (
        F.conv2d(
            x.isfinite().logical_not().double().permute(0, 3, 1, 2),
            torch.ones(weight.shape).double(),
            None,
            case.stride,
            1,
            1,
            case.groups,
        )
        == 0
    )
    assert unseen[4].all() and torch.equal(y[unseen], clean[unseen])
    assert torch.equal(expected[unseen].isfinite(), torch.ones(int(unseen.sum())).bool())


@pytest.mark.parametrize("merged", [0, 2, 5])
def test_rejects_groups_that_cannot_be_one_product(merged):
    x, weight, out = torch.zeros(1, 4, 4, 9), torch.zeros(9, 1, 1, 9), torch.zeros(1, 4, 4, 9)
    shape = ConvShape(1, 4, 4, 9, 9, 1, 1)
    with pytest.raises(ValueError, match=f"merged is {merged}, expected a divisor of 9 input"):
        options = {"shape": shape, "target": Target.typical(90), "merged": merged}
        conv2d_launch(x, weight, None, None, out, **options)
