from dataclasses import dataclass

import pytest
import torch

from fastres.kernels import reference
from fastres.kernels.geometry import PoolShape, max_pool_cost
from fastres.kernels.pool import avg_pool, avg_pool_cost, avg_pool_launch, max_pool
from fastres.kernels.tiles import PoolTile

Pair = tuple[int, int]


@dataclass(frozen=True)
class Case:
    name: str
    x: tuple[int, int, int, int]  # N, H, W, C
    kernel: Pair = (3, 3)
    stride: Pair = (2, 2)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False
    dtype: torch.dtype = torch.float16
    tile: PoolTile | None = None


CASES = (
    Case("resnet", (2, 14, 14, 64)),
    Case("resnet-bf16", (1, 14, 14, 64), dtype=torch.bfloat16),
    Case("resnet-fp32", (1, 8, 8, 64), dtype=torch.float32),
    Case("odd-size-and-channels", (3, 7, 5, 21)),
    Case("ceil-mode", (1, 8, 8, 16), padding=(0, 0), ceil_mode=True),
    Case("ceil-mode-last-window-dropped", (1, 6, 6, 16), (2, 2), (3, 3), (1, 1), ceil_mode=True),
    Case("downsample-2x2", (1, 7, 7, 16), (2, 2), padding=(0, 0)),
    Case("dilated", (1, 9, 9, 16), stride=(1, 1), dilation=(2, 2)),
    Case("all-unequal", (2, 9, 8, 8), (2, 3), (3, 1), (1, 0), (1, 2)),
    Case("one-channel", (1, 5, 5, 1)),
    Case("many-channel-tiles", (1, 5, 5, 40), tile=PoolTile(4, 16, 1)),
    Case("batch-0", (0, 8, 8, 16)),
)


def meaning(case: Case, x: torch.Tensor) -> torch.Tensor:
    options = (case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode)
    return reference.max_pool(x.cpu().permute(0, 3, 1, 2), *options).permute(0, 2, 3, 1)


def run(case: Case, x: torch.Tensor, out: torch.Tensor) -> None:
    max_pool(
        x,
        kernel=case.kernel,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        ceil_mode=case.ceil_mode,
        out=out,
        tile=case.tile,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_pytorch(case, device, guarded, poisoned, assert_parity):
    values = torch.randn(case.x, generator=torch.Generator().manual_seed(0))
    x = guarded(values.to(case.dtype).to(device))
    expected = meaning(case, x)
    out = poisoned(expected.shape, case.dtype, device)
    run(case, x, out)
    assert_parity(out, expected.double(), expected)
    assert torch.equal(out.cpu(), expected), "a maximum is exact"


def test_nan_wins(device, guarded, poisoned, assert_parity):
    case = Case("nan", (1, 8, 8, 8))
    x = guarded(torch.randn(case.x, device=device).half())
    x[0, 3, 3, 2] = float("nan")
    x[0, 4, 4, 2] = float("inf")
    x[0, :, :, 3] = float("-inf")
    expected = meaning(case, x)
    assert expected.isnan().sum() == 4
    out = poisoned(expected.shape, case.dtype, device)
    run(case, x, out)
    assert_parity(out, expected.double(), expected)


def test_reads_strided_input(device, guarded):
    wide = guarded(torch.randn(2, 12, 12, 24, device=device).half())
    x = wide[:, 1::2, ::2, 8:]
    case = Case("view", (2, 6, 6, 16))
    out = max_pool(x, kernel=case.kernel, stride=case.stride, padding=case.padding)
    assert torch.equal(out.cpu(), meaning(case, x))


X = torch.zeros(1, 8, 8, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, r"x has shape \[8, 8, 16\]"),
        ({"x": X.long()}, "x has dtype torch.int64"),
        ({"x": X.permute(0, 3, 1, 2)}, "x has stride 16 in its last dimension"),
        ({"kernel": (0, 3)}, r"kernel is \(0, 3\)"),
        ({"padding": (2, 0)}, r"padding is \(2, 0\), expected 0 to half of the kernel \(3, 3\)"),
        ({"padding": (0, -1)}, r"padding is \(0, -1\)"),
        ({"kernel": (9, 9)}, r"the window gives no output"),
        ({"x": X[..., :0]}, "gives no output"),
        ({"out": torch.zeros(1, 3, 3, 8)}, r"out has shape \[1, 3, 3, 8\], expected"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "-".join(value),
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        max_pool(**{"x": X, "kernel": (3, 3), "stride": (2, 2)} | arguments)


def test_refuses_more_pixels_than_it_counts():
    with pytest.raises(ValueError, match=r"2147483648 output pixels, expected under 2\*\*31"):
        PoolShape(2**15, 256, 256, 1, (1, 1), (1, 1))


def test_cost():
    cost = max_pool_cost(PoolShape(1, 112, 112, 64, (3, 3), (2, 2), (1, 1)), itemsize=2)
    assert cost.flops == 9 * 56 * 56 * 64
    assert cost.bytes == 2 * 64 * (112 * 112 + 56 * 56)


@dataclass(frozen=True)
class MeanCase:
    name: str
    x: tuple[int, int, int, int]  # N, H, W, C
    kernel: Pair = (2, 2)
    stride: Pair = (2, 2)
    padding: Pair = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None
    dtype: torch.dtype = torch.float16
    tile: PoolTile | None = None


MEANS = (
    MeanCase("resnet-d", (2, 14, 14, 64)),
    MeanCase("resnet-d-odd", (2, 7, 7, 64), ceil_mode=True, count_include_pad=False),
    MeanCase("bf16", (1, 8, 8, 32), dtype=torch.bfloat16),
    MeanCase("fp32", (1, 8, 8, 32), dtype=torch.float32),
    MeanCase("padded", (2, 7, 9, 20), (3, 3), (2, 2), (1, 1)),
    MeanCase("padding-left-out", (2, 7, 9, 20), (3, 3), (2, 2), (1, 1), count_include_pad=False),
    MeanCase("ceil", (1, 8, 8, 16), (3, 3), (2, 2), (1, 1), ceil_mode=True),
    MeanCase("ceil-no-padding", (1, 8, 8, 16), (3, 3), (2, 2), ceil_mode=True),
    MeanCase("ceil-left-out", (1, 8, 8, 16), (3, 3), (2, 2), (1, 1), True, count_include_pad=False),
    MeanCase("dropped-window", (1, 6, 6, 16), (2, 2), (3, 3), (1, 1), ceil_mode=True),
    MeanCase("divisor", (1, 8, 8, 16), (3, 3), (2, 2), (1, 1), divisor=5),
    MeanCase("divisor-ceil", (1, 7, 7, 16), ceil_mode=True, divisor=-3),
    MeanCase("all-unequal", (2, 9, 8, 8), (2, 3), (3, 1), (1, 0), count_include_pad=False),
    MeanCase("whole-picture", (2, 7, 7, 24), (7, 7), (1, 1)),
    MeanCase("many-channel-tiles", (1, 5, 5, 40), tile=PoolTile(4, 16, 1)),
    MeanCase("batch-0", (0, 8, 8, 16)),
)


def mean_of(case: MeanCase, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    options = (case.padding, case.ceil_mode, case.count_include_pad, case.divisor)
    nchw = x.cpu().to(dtype).permute(0, 3, 1, 2)
    y = torch.nn.functional.avg_pool2d(nchw, case.kernel, case.stride, *options)
    return y.permute(0, 2, 3, 1)


@pytest.mark.parametrize("case", MEANS, ids=lambda case: case.name)
def test_mean_equals_pytorch(case, device, guarded, poisoned, assert_parity):
    values = torch.randn(case.x, generator=torch.Generator().manual_seed(0))
    x = guarded(values.to(case.dtype).to(device))
    oracle = mean_of(case, x, torch.float64)
    out = poisoned(oracle.shape, case.dtype, device)
    given_out = avg_pool(
        x,
        kernel=case.kernel,
        stride=case.stride,
        padding=case.padding,
        ceil_mode=case.ceil_mode,
        count_include_pad=case.count_include_pad,
        divisor=case.divisor,
        out=out,
        tile=case.tile,
    )
    assert given_out is out
    assert_parity(out, oracle, mean_of(case, x, torch.float32).to(case.dtype))


def test_mean_keeps_nan_and_infinities(device):
    x = torch.zeros(1, 4, 4, 8, device=device)
    x[0, 0, 0, 1], x[0, 3, 3, 2] = float("nan"), float("-inf")
    y = avg_pool(x, kernel=(2, 2), stride=(2, 2))
    assert y[0, 0, 0, 1].isnan() and y[0, 1, 1, 2] == float("-inf")
    assert y.isfinite().sum() == y.numel() - 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, r"x has shape \[8, 8, 16\]"),
        ({"padding": (2, 0)}, r"padding is \(2, 0\), expected 0 to half of the kernel \(3, 3\)"),
        ({"divisor": 0}, "divisor is 0"),
        ({"out": torch.zeros(1, 3, 3, 8)}, r"out has shape \[1, 3, 3, 8\], expected"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "-".join(value),
)
def test_mean_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        avg_pool(**{"x": X, "kernel": (3, 3), "stride": (2, 2)} | arguments)


def test_mean_has_no_dilation():
    shape = PoolShape(1, 8, 8, 16, (3, 3), (2, 2), dilation=(2, 2))
    with pytest.raises(ValueError, match=r"dilation is \(2, 2\), expected \(1, 1\)"):
        avg_pool_launch(X, X, shape=shape)


def test_mean_cost():
    cost = avg_pool_cost(PoolShape(1, 8, 8, 16, (2, 2), (2, 2)), itemsize=2)
    assert (cost.flops, cost.bytes) == (4 * 16 * 16, 2 * 16 * (64 + 16))
