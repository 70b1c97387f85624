from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastres.kernels import reference
from fastres.kernels.conv2d import conv2d_tma, conv2d_tma_launches, pack_weight
from fastres.kernels.cost import Target
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.geometry import ConvShape
from fastres.kernels.tiles import BoxTile

Pair = tuple[int, int]
HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
SQUARE = BoxTile(1, 8, 8, 64, 64, 4, 3)
SMALL = BoxTile(1, 4, 4, 64, 16, 4, 2)
RAGGED = BoxTile(2, 4, 4, 64, 32, 4, 3)  # over 3 images: the second box holds one that is not
ROW = BoxTile(1, 1, 64, 64, 32, 4, 3)


@dataclass(frozen=True)
class Case:
    name: str
    x: tuple[int, int, int, int]  # N, H, W, C
    k: int
    taps: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    x2: tuple[int, int, int, int] | None = None
    stride2: Pair = (1, 1)
    bias: bool = True
    residual: bool = False
    activation: ActivationKind | None = "relu"
    dtype: torch.dtype = HALF
    tile: BoxTile | None = None

    def shape(self) -> ConvShape:
        return ConvShape(*self.x, self.k, *self.taps, self.stride, self.padding, self.dilation)

    def options(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "stride2": self.stride2,
            "activation": self.activation,
            "allow_tf32": self.dtype == FP32,
        }


def same(name: str, x: tuple[int, int, int, int], k: int, **kwargs: Any) -> Case:
    """A 3x3 that keeps the size."""
    return Case(name, x, k, (3, 3), padding=(1, 1), **kwargs)


def halving(name: str, x: tuple[int, int, int, int], k: int, **kwargs: Any) -> Case:
    """A 3x3 that halves the size."""
    return Case(name, x, k, (3, 3), (2, 2), (1, 1), **kwargs)


CASES = (
    Case("layer1.0.conv1", (1, 14, 14, 64), 64),
    same("layer1.0.conv2", (2, 9, 9, 64), 64, tile=SQUARE),
    same("layer1.0.conv2-bf16", (1, 9, 9, 64), 64, dtype=BF16, tile=SQUARE),
    same("layer1.0.conv2-tf32", (1, 6, 6, 64), 64, dtype=FP32),
    Case("layer1.0.conv3+downsample", (2, 7, 7, 64), 256, x2=(2, 7, 7, 64)),
    Case("layer1.1.conv3", (2, 7, 7, 64), 256, residual=True),
    Case("layer1.1.conv3-bf16", (2, 7, 7, 64), 256, residual=True, dtype=BF16),
    halving("layer2.0.conv2", (2, 16, 16, 128), 128, tile=SQUARE),
    Case("layer2.0.conv3+downsample", (2, 5, 5, 128), 256, x2=(2, 10, 10, 256), stride2=(2, 2)),
    Case("layer2.0.downsample.0", (1, 8, 8, 256), 512, stride=(2, 2), activation=None),
    same("layer4.1.conv2", (1, 7, 7, 512), 64),
    same("rn18-block", (2, 8, 8, 64), 64, residual=True),
    same("rn18-head", (3, 5, 5, 64), 64, x2=(3, 10, 10, 32), stride2=(2, 2), tile=RAGGED),
    same("ragged", (3, 5, 7, 32), 72, residual=True, tile=RAGGED),
    Case("ragged-row", (3, 5, 7, 32), 72, residual=True, tile=ROW),
    halving("ragged-halving", (3, 10, 6, 32), 72, residual=True, tile=RAGGED),
    Case("1x1-of-stride-2-over-odd", (3, 7, 9, 32), 8, stride=(2, 2), tile=RAGGED),
    Case("1x1-of-unequal-strides", (1, 7, 9, 32), 8, stride=(3, 2), tile=SMALL),
    Case("1x1-padded", (1, 4, 4, 16), 16, padding=(2, 1), tile=SMALL),
    Case("1x1-padded-of-stride-2", (1, 4, 6, 16), 16, stride=(2, 2), padding=(1, 3), tile=SMALL),
    Case("projection-over-odd", (3, 4, 5, 32), 72, x2=(3, 7, 9, 64), stride2=(2, 2), tile=RAGGED),
    Case("dilated", (1, 9, 9, 32), 32, (3, 3), padding=(2, 2), dilation=(2, 2)),
    Case("all-unequal", (2, 9, 8, 16), 24, (5, 3), (1, 1), (1, 2), (1, 2), tile=SMALL),
    Case("halving-unequal", (2, 10, 8, 16), 24, (4, 3), (2, 2), (0, 2), (2, 1), tile=SMALL),
    Case("stem-like", (1, 12, 14, 16), 64, (7, 7), (2, 2), (3, 3), tile=SMALL),
    Case("row-filter", (1, 6, 6, 16), 16, (1, 7), padding=(0, 3), tile=SMALL),
    same("split", (3, 5, 5, 64), 72, residual=True, tile=replace(RAGGED, split_k=3)),
    halving("split-halving", (3, 6, 6, 64), 72, tile=replace(RAGGED, split_k=2)),
    Case(
        "split-projection",
        (2, 5, 5, 64),
        72,
        x2=(2, 5, 5, 128),
        residual=True,
        tile=replace(ROW, split_k=2),
    ),
    same("split-bf16", (1, 5, 5, 32), 16, dtype=BF16, tile=replace(SMALL, split_k=9)),
    same("no-bias", (1, 5, 5, 32), 32, bias=False),
    same("residual-only", (1, 5, 5, 32), 32, bias=False, residual=True, activation=None),
    same("batch-0", (0, 7, 7, 64), 64, residual=True),
    Case("batch-0-row", (0, 7, 7, 64), 64, x2=(0, 7, 7, 32)),
    same("batch-0-split", (0, 7, 7, 64), 64, tile=replace(RAGGED, split_k=3)),
    *(
        Case(kind, (1, 5, 5, 32), 32, residual=True, activation=kind)
        for kind in ("silu", "sigmoid", "gelu", "hardswish")
    ),
)


@dataclass(frozen=True)
class Operands:
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    x2: torch.Tensor | None
    weight2: torch.Tensor | None
    residual: torch.Tensor | None


def operands(case: Case, device: torch.device, embed: Callable[..., torch.Tensor]) -> Operands:
    """Values such that sums have a size near one."""
    random = torch.Generator().manual_seed(0)
    shape = case.shape()

    def draw(*sizes: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        values = torch.randn(sizes, generator=random) * scale
        if case.dtype == FP32:  # as plans store it: tensor cores would cut off what is not rounded
            values = reference.round_tf32(values)
        return embed(values.to(dtype).to(device))

    scale = (shape.gemm.k + (case.x2[3] if case.x2 else 0)) ** -0.5
    return Operands(
        x=draw(*case.x),
        weight=draw(case.k, *case.taps, case.x[3], scale=scale),
        bias=draw(case.k, dtype=FP32) if case.bias else None,
        x2=draw(*case.x2) if case.x2 else None,
        weight2=draw(case.k, case.x2[3], scale=scale) if case.x2 else None,
        residual=draw(shape.n, shape.p, shape.q, case.k) if case.residual else None,
    )


def meaning(case: Case, dtype: torch.dtype, given: Operands) -> torch.Tensor:
    """The reference in NHWC: products and sums in fp64, or in fp32 where dtype is narrower."""
    wide = torch.promote_types(dtype, FP32)

    def nchw(x: torch.Tensor) -> torch.Tensor:
        return x.cpu().to(wide).permute(0, 3, 1, 2)

    added = None if given.residual is None else nchw(given.residual)
    if given.x2 is not None and given.weight2 is not None:
        weight2 = given.weight2.cpu().to(wide)[:, :, None, None]
        second = reference.conv2d(nchw(given.x2), weight2, stride=case.stride2, padding=(0, 0))
        added = second if added is None else added + second
    y = reference.conv2d(
        nchw(given.x),
        nchw(given.weight),
        None if given.bias is None else given.bias.cpu().to(wide),
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        residual=added,
        activation=case.activation,
    )
    return y.permute(0, 2, 3, 1).to(dtype)


def run(case: Case, given: Operands, out: torch.Tensor) -> torch.Tensor:
    return conv2d_tma(
        given.x,
        given.weight,
        given.bias,
        x2=given.x2,
        weight2=given.weight2,
        residual=given.residual,
        out=out,
        tile=case.tile,
        **case.options(),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(case, device, guarded, poisoned, assert_parity):
    given = operands(case, device, guarded)
    oracle = meaning(case, torch.float64, given)
    out = poisoned(oracle.shape, case.dtype, device)
    assert run(case, given, out) is out
    # TF32 keeps 10 bits of the fraction, as fp16 does
    baseline = meaning(case, HALF if case.dtype == FP32 else case.dtype, given)
    assert_parity(out, oracle, baseline)


@pytest.mark.interpret
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_geometry(data, guarded, poisoned, assert_parity):
    pair = lambda low, high: st.tuples(*[st.integers(low, high)] * 2)  # noqa: E731
    stride = data.draw(st.sampled_from([1, 2]))
    taps, dilation, padding = data.draw(pair(1, 3)), data.draw(pair(1, 2)), data.draw(pair(0, 2))
    sizes = [
        data.draw(st.integers(max(1, d * (t - 1) + 1 - 2 * p), 9))
        for t, d, p in zip(taps, dilation, padding, strict=True)
    ]
    if stride == 2:
        sizes = [size + size % 2 for size in sizes]
    case = Case(
        "any",
        (data.draw(st.integers(1, 3)), *sizes, 16 * data.draw(st.integers(1, 2))),
        8 * data.draw(st.integers(1, 9)),
        taps,
        (stride, stride),
        padding,
        dilation,
        residual=data.draw(st.booleans()),
        tile=data.draw(st.sampled_from([SMALL, replace(SMALL, tn=4, th=2)])),
    )
    test_matches_reference(case, torch.device("cpu"), guarded, poisoned, assert_parity)


def test_programs_walk_over_many_tiles(device, guarded, poisoned, assert_parity):
    """A grid smaller than the tiles: a card of two SMs."""
    case = same("walk", (3, 7, 7, 32), 136, tile=SMALL)
    given = operands(case, device, guarded)
    oracle = meaning(case, torch.float64, given)
    out = poisoned(oracle.shape, HALF, device)
    (launch,) = conv2d_tma_launches(
        given.x,
        pack_weight(given.weight),
        given.bias,
        None,
        out,
        shape=case.shape(),
        target=Target(90, 2),
        activation="relu",
        tile=SMALL,
    )
    assert launch.programs == 2 and launch.arguments["TILES"] == 3 * 2 * 2 * 3
    launch.run()
    assert_parity(out, oracle, meaning(case, HALF, given))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # 0 * inf, past the last channel
@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_what_pytorch_says(
    value, split_k, device, guarded, poisoned, assert_parity
):
    case = same("nan", (3, 6, 6, 32), 16, tile=replace(RAGGED, split_k=split_k))
    given = operands(case, device, guarded)
    given.x[1, 2, 3, 5] = value
    oracle = meaning(case, torch.float64, given)
    assert (~oracle.isfinite()).sum() > 0 and oracle[[0, 2]].isfinite().all()
    out = poisoned(oracle.shape, HALF, device)
    assert_parity(run(case, given, out), oracle, meaning(case, HALF, given))


def test_split_sums_are_the_same_every_time(device, guarded, poisoned):
    case = same("twice", (2, 5, 5, 64), 64, tile=replace(RAGGED, split_k=6))
    given = operands(case, device, guarded)
    first, second = (run(case, given, poisoned((2, 5, 5, 64), HALF, device)) for _ in range(2))
    assert torch.equal(first, second)


def test_allocates_its_output(device):
    x = torch.ones((1, 4, 4, 16), dtype=HALF, device=device)
    y = conv2d_tma(x, torch.ones((8, 2, 2, 16), dtype=HALF, device=device), stride=(2, 2))
    assert y.dtype == HALF and y.is_contiguous() and y.device.type == device.type
    assert torch.equal(y.cpu(), torch.full((1, 2, 2, 8), 64.0, dtype=HALF))
