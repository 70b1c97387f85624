"""int8 convolutions through boxes: the reference's bits, a projection's own scales, int32 parts."""

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
INT8, HALF, FP32, FP8 = torch.int8, torch.float16, torch.float32, torch.float8_e4m3fn
HOPPER = Target(90, 132)
SMALL = BoxTile(1, 4, 4, 64, 32, 4, 2)
RAGGED = BoxTile(2, 2, 8, 64, 32, 4, 3)


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
    residual: torch.dtype | None = None
    residual_scale: float = 0.037
    out_scale: float = 1 / 0.021
    activation: ActivationKind | None = "relu"
    dtype: torch.dtype = INT8  # of the output
    tile: BoxTile | None = None

    def shape(self) -> ConvShape:
        return ConvShape(*self.x, self.k, *self.taps, self.stride, self.padding, self.dilation)


def same(name: str, x: tuple[int, int, int, int], k: int, **fields: Any) -> Case:
    """A 3x3 that keeps the size."""
    return Case(name, x, k, (3, 3), padding=(1, 1), **fields)


CASES = (
    same("layer1.0.conv2", (2, 9, 9, 64), 64),
    same("layer2.1.conv2", (2, 7, 7, 128), 128, tile=BoxTile(2, 4, 4, 128, 128, 4, 2)),
    Case("layer1.0.conv3", (2, 7, 7, 64), 256, residual=INT8),
    Case("layer4.1.conv1", (1, 7, 7, 512), 64),
    Case("layer2.0.conv2", (2, 10, 10, 128), 128, (3, 3), (2, 2), (1, 1), tile=SMALL),
    Case("layer2.0.downsample.0", (1, 8, 8, 64), 128, stride=(2, 2), activation=None),
    Case("strided-odd", (2, 9, 7, 32), 16, stride=(2, 2)),
    Case("merged", (2, 6, 6, 64), 128, x2=(2, 6, 6, 32)),
    Case("merged-strided", (2, 5, 5, 64), 128, x2=(2, 10, 9, 64), stride2=(2, 2), tile=RAGGED),
    Case("merged-residual", (1, 6, 6, 32), 64, x2=(1, 6, 6, 64), residual=INT8),
    Case("merged-no-bias", (1, 6, 6, 32), 64, x2=(1, 6, 6, 64), bias=False, activation=None),
    same("merged-3x3", (1, 6, 6, 32), 48, x2=(1, 6, 6, 32), dtype=FP32, tile=SMALL),
    same("split", (2, 7, 7, 64), 64, tile=replace(RAGGED, split_k=3)),
    same("split-residual", (1, 7, 7, 64), 80, residual=INT8, tile=replace(SMALL, split_k=6)),
    same(
        "split-to-half",
        (1, 5, 5, 32),
        16,
        dtype=HALF,
        out_scale=1.0,
        tile=replace(SMALL, split_k=9),
    ),
    same("half-residual", (1, 6, 6, 32), 64, residual=HALF, residual_scale=0.3, tile=SMALL),
    same("fp32-out", (1, 6, 6, 32), 64, dtype=FP32, residual=INT8, tile=SMALL),
    same("ragged-channels", (3, 5, 7, 96), 144, residual=INT8, tile=RAGGED),
    same("no-bias", (1, 6, 6, 32), 16, bias=False, tile=SMALL),
    Case("dilated", (1, 8, 8, 32), 32, (3, 3), padding=(2, 2), dilation=(2, 2), tile=SMALL),
    Case("uneven", (1, 8, 7, 32), 32, (3, 2), padding=(2, 1), dilation=(1, 2), tile=SMALL),
    same("bare", (1, 6, 6, 32), 16, bias=False, out_scale=1.0, activation=None, tile=SMALL),
    same("batch-0", (0, 7, 7, 64), 64, residual=INT8),
)


@dataclass(frozen=True)
class Operands:
    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    x2: torch.Tensor | None
    weight2: torch.Tensor | None
    scale2: torch.Tensor | None
    residual: torch.Tensor | None


def operands(case: Case, device: torch.device, embed: Callable[..., torch.Tensor]) -> Operands:
    """Every value of int8, and scales for which v is near one and some outputs saturate."""
    random = torch.Generator().manual_seed(0)
    shape = case.shape()

    def draw(*sizes: int, dtype: torch.dtype = INT8) -> torch.Tensor:
        if dtype == INT8:
            values = torch.randint(-128, 128, sizes, generator=random, dtype=INT8)
        else:
            values = torch.randn(sizes, generator=random).to(dtype)
        return embed(values.to(device))

    def scales(depth: int) -> torch.Tensor:
        size = 74.0**2 * depth**0.5  # of a sum of products
        return embed(((0.5 + torch.rand(case.k, generator=random)) / size).to(device))

    channels2 = case.x2[3] if case.x2 else 0
    return Operands(
        x=draw(*case.x),
        weight=draw(case.k, *case.taps, case.x[3]),
        scale=scales(shape.gemm.k),
        bias=draw(case.k, dtype=FP32) if case.bias else None,
        x2=draw(*case.x2) if case.x2 else None,
        weight2=draw(case.k, channels2) if case.x2 else None,
        scale2=scales(channels2) if case.x2 else None,
        residual=draw(shape.n, shape.p, shape.q, case.k, dtype=case.residual)
        if case.residual
        else None,
    )


def nchw(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().permute(0, 3, 1, 2)


def meaning(case: Case, given: Operands) -> torch.Tensor:
    """The reference in NHWC.

    A projection is a sum of its own, acc2 * scale2 in fp32, added after the bias: it takes the
    place of a residual of scale 1, and what the residual adds comes after it.
    """
    first = reference.conv2d_int8(
        nchw(given.x),
        nchw(given.weight),
        given.scale.cpu(),
        None if given.bias is None else given.bias.cpu(),
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        dtype=FP32,
    )
    if given.x2 is not None:
        assert given.weight2 is not None and given.scale2 is not None
        first = first + reference.conv2d_int8(
            nchw(given.x2),
            given.weight2.cpu()[:, :, None, None],
            given.scale2.cpu(),
            stride=case.stride2,
            padding=(0, 0),
            dtype=FP32,
        )
    if given.residual is not None:
        scale = torch.tensor(case.residual_scale, dtype=FP32)
        first = first + nchw(given.residual).float() * scale
    if case.activation == "relu":
        first = first.relu()
    y = first * torch.tensor(case.out_scale, dtype=FP32)
    y = reference.requantise(y) if case.dtype == INT8 else y.to(case.dtype)
    return y.permute(0, 2, 3, 1)


def run(case: Case, given: Operands, out: torch.Tensor) -> torch.Tensor:
    return conv2d_tma(
        given.x,
        given.weight,
        given.bias,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        x2=given.x2,
        weight2=given.weight2,
        stride2=case.stride2,
        residual=given.residual,
        activation=case.activation,
        scale=given.scale,
        scale2=given.scale2,
        residual_scale=case.residual_scale if case.residual else 1.0,
        out_scale=case.out_scale,
        out=out,
        tile=case.tile,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_bits_as_the_reference(case, device, guarded, poisoned, assert_exact):
    given = operands(case, device, guarded)
    oracle = meaning(case, given)
    if case.dtype == INT8 and oracle.numel() > 0 and case.out_scale != 1.0:
        assert 0.001 < (oracle == 127).double().mean() < 0.4, "some saturate, most do not"
    out = poisoned(oracle.shape, case.dtype, device)
    assert run(case, given, out) is out
    assert_exact(out, oracle)


def test_the_meaning_above_is_the_reference_where_there_is_one_sum():
    case = same("one", (1, 5, 5, 32), 16, residual=INT8)
    given = operands(case, torch.device("cpu"), lambda x: x)
    whole = reference.conv2d_int8(
        nchw(given.x),
        nchw(given.weight),
        given.scale,
        given.bias,
        stride=(1, 1),
        padding=(1, 1),
        residual=nchw(given.residual),
        residual_scale=case.residual_scale,
        activation="relu",
        out_scale=case.out_scale,
    )
    assert torch.equal(whole.permute(0, 2, 3, 1), meaning(case, given))


@pytest.mark.interpret
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_geometry(data, guarded, poisoned, assert_exact):
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
        (data.draw(st.integers(1, 3)), *sizes, 32 * data.draw(st.integers(1, 2))),
        16 * data.draw(st.integers(1, 5)),
        taps,
        (stride, stride),
        padding,
        dilation,
        residual=data.draw(st.sampled_from([None, INT8])),
        tile=data.draw(st.sampled_from([SMALL, replace(SMALL, tn=4, th=2)])),
    )
    cpu = torch.device("cpu")
    drawn = operands(case, cpu, guarded)
    oracle = meaning(case, drawn)
    assert_exact(run(case, drawn, poisoned(oracle.shape, INT8, cpu)), oracle)


def test_the_projection_is_not_scaled_as_the_first_sum(device, guarded, poisoned):
    """One common scale would give other values: the check above can fail."""
    case = Case("merged", (1, 4, 4, 32), 64, x2=(1, 4, 4, 32), tile=SMALL)
    given = operands(case, device, guarded)
    out = run(case, given, poisoned((1, 4, 4, 64), INT8, device))
    wrong = meaning(case, replace(given, scale2=given.scale))
    assert (out.cpu() != wrong).double().mean() > 0.1


def test_programs_walk_over_many_tiles(device, guarded, poisoned, assert_exact):
    """A grid smaller than the tiles: a card of two SMs."""
    case = same("walk", (3, 7, 7, 32), 144, tile=SMALL)
    given = operands(case, device, guarded)
    out = poisoned((3, 7, 7, 144), INT8, device)
    (launch,) = conv2d_tma_launches(
        given.x,
        pack_weight(given.weight),
        given.bias,
        None,
        out,
        shape=case.shape(),
        target=Target(90, 2),
        activation="relu",
        scale=given.scale,
        out_scale=case.out_scale,
        tile=SMALL,
    )
    assert launch.programs == 2 and launch.arguments["TILES"] == 3 * 2 * 2 * 3
    assert launch.options["enable_fp_fusion"] is False
    launch.run()
    assert_exact(out, meaning(case, given))


def test_fp8_to_half_is_exact_where_sums_are_small(device, poisoned):
    random = torch.Generator().manual_seed(0)
    x, x2 = ((torch.randint(-7, 8, (1, 6, 6, 32), generator=random) / 2).to(FP8) for _ in range(2))
    weight = (torch.randint(-7, 8, (64, 1, 1, 32), generator=random) / 2).to(FP8)
    weight2 = (torch.randint(-7, 8, (64, 32), generator=random) / 2).to(FP8)
    scale, scale2 = torch.full((64,), 0.5), torch.full((64,), 0.25)
    out = conv2d_tma(
        x.to(device),
        weight.to(device),
        x2=x2.to(device),
        weight2=weight2.to(device),
        scale=scale.to(device),
        scale2=scale2.to(device),
        out=poisoned((1, 6, 6, 64), FP32, device),
        tile=SMALL,
    )
    wide = [v.double() for v in (x, weight.view(64, 32), x2, weight2)]
    expected = wide[0] @ wide[1].T / 2 + wide[2] @ wide[3].T / 4
    assert torch.equal(out.cpu().double(), expected)
