"""int8 convolutions over pointers: the reference's bits; fp8 where the interpreter can be right."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastres.kernels import reference
from fastres.kernels.conv2d import conv2d, conv2d_launch
from fastres.kernels.cost import Target
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.geometry import ConvShape
from fastres.kernels.tiles import ConvTile

Pair = tuple[int, int]
INT8, HALF, BF16, FP32 = torch.int8, torch.float16, torch.bfloat16, torch.float32
FP8 = torch.float8_e4m3fn
SMALL = ConvTile(16, 16, 32, 4, 2)
WIDE = ConvTile(64, 64, 64, 4, 3)


@dataclass(frozen=True)
class Case:
    name: str
    x: tuple[int, int, int, int]  # N, H, W, C
    k: int
    taps: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = True
    residual: torch.dtype | None = None
    residual_scale: float = 0.037
    out_scale: float = 1 / 0.021
    activation: ActivationKind | None = "relu"
    dtype: torch.dtype = INT8  # of the output
    tile: ConvTile | None = None

    def shape(self) -> ConvShape:
        sizes = (*self.x, self.k, *self.taps)
        return ConvShape(*sizes, self.stride, self.padding, self.dilation, self.groups)

    def options(self) -> dict[str, Any]:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "activation": self.activation,
            "residual_scale": self.residual_scale if self.residual else 1.0,
            "out_scale": self.out_scale,
        }


CASES = (
    Case("layer1.0.conv1", (1, 14, 14, 64), 64),
    Case("layer1.0.conv2", (2, 9, 9, 64), 64, (3, 3), padding=(1, 1)),
    Case("layer1.0.conv3", (2, 7, 7, 64), 256, residual=INT8),
    Case("layer2.0.conv2", (2, 10, 10, 128), 128, (3, 3), (2, 2), (1, 1), tile=WIDE),
    Case("layer2.0.downsample.0", (1, 8, 8, 256), 512, stride=(2, 2), activation=None),
    Case("layer4.1.conv2", (1, 7, 7, 512), 64, (3, 3), padding=(1, 1)),
    Case("cifar-stem", (2, 8, 8, 3), 16, (3, 3), padding=(1, 1)),
    Case("half-out", (2, 7, 7, 64), 64, dtype=HALF, out_scale=1.0, activation=None),
    Case("bf16-out", (1, 7, 7, 64), 64, dtype=BF16, out_scale=1.0, activation=None),
    Case("fp32-out", (2, 7, 7, 64), 64, dtype=FP32, out_scale=1.0, residual=INT8),
    Case("fp32-out-scaled", (1, 5, 5, 64), 64, dtype=FP32, residual=HALF),
    Case("half-residual", (2, 5, 7, 64), 64, residual=HALF, residual_scale=1.0),
    Case("fp32-residual", (1, 5, 7, 64), 64, residual=FP32, residual_scale=0.3),
    Case("bf16-residual", (1, 5, 7, 64), 64, residual=BF16, residual_scale=0.3),
    Case("scale-1", (1, 5, 7, 64), 64, residual=INT8, residual_scale=1.0, out_scale=1.5),
    Case("c-of-20", (3, 5, 7, 20), 70, (3, 3), padding=(1, 1), residual=INT8),
    Case("c-of-48", (1, 5, 5, 48), 33, (3, 3), padding=(1, 1)),
    Case("c-of-16", (1, 5, 5, 16), 8, (3, 3), padding=(1, 1)),
    Case("c-of-7", (2, 5, 3, 7), 9, (3, 3), padding=(1, 1), activation=None),
    Case("one-channel-each-way", (2, 5, 5, 1), 1, (3, 3), padding=(1, 1)),
    Case("one-output", (2, 5, 5, 64), 1, residual=INT8),
    Case("stride-2-odd", (1, 9, 11, 32), 33, (3, 3), (2, 2), (1, 1)),
    Case("dilated", (1, 9, 9, 32), 32, (3, 3), padding=(2, 2), dilation=(2, 2)),
    Case("all-unequal", (2, 9, 8, 32), 24, (5, 3), (2, 1), (1, 2), (1, 2), tile=SMALL),
    Case("resnext-32x4d", (1, 6, 6, 128), 128, (3, 3), padding=(1, 1), groups=32),
    Case("groups-uneven", (2, 5, 5, 48), 36, (3, 3), padding=(1, 1), groups=3, residual=INT8),
    Case("depthwise", (1, 6, 6, 16), 16, (3, 3), padding=(1, 1), groups=16),
    Case("no-bias", (1, 5, 5, 32), 32, bias=False),
    Case("bare", (1, 5, 5, 32), 32, bias=False, out_scale=1.0, activation=None),
    Case("batch-0", (0, 7, 7, 64), 64, (3, 3), padding=(1, 1), residual=INT8),
)


@dataclass(frozen=True)
class Operands:
    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
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

    size = 74.0**2 * shape.gemm.k**0.5  # of a sum of products
    scale = (0.5 + torch.rand(case.k, generator=random)) / size
    return Operands(
        x=draw(*case.x),
        weight=draw(case.k, *case.taps, case.x[3] // case.groups),
        scale=embed(scale.to(device)),
        bias=draw(case.k, dtype=FP32) if case.bias else None,
        residual=draw(shape.n, shape.p, shape.q, case.k, dtype=case.residual)
        if case.residual
        else None,
    )


def nchw(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.cpu().permute(0, 3, 1, 2)


def meaning(case: Case, given: Operands) -> torch.Tensor:
    """The reference in NHWC; in fp32 for a bf16 output, which `assert_exact` rounds."""
    y = reference.conv2d_int8(
        nchw(given.x),
        nchw(given.weight),
        given.scale.cpu(),
        None if given.bias is None else given.bias.cpu(),
        residual=nchw(given.residual),
        dtype=FP32 if case.dtype == BF16 else case.dtype,
        **case.options(),
    )
    return y.permute(0, 2, 3, 1)


def run(case: Case, given: Operands, out: torch.Tensor) -> torch.Tensor:
    return conv2d(
        given.x,
        given.weight,
        given.bias,
        scale=given.scale,
        residual=given.residual,
        out=out,
        tile=case.tile,
        **case.options(),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_bits_as_the_reference(case, device, guarded, poisoned, assert_exact):
    given = operands(case, device, guarded)
    oracle = meaning(case, given)
    if case.dtype == INT8 and oracle.numel() > 100 and case.out_scale != 1.0:
        assert 0.001 < (oracle == 127).double().mean() < 0.4, "some saturate, most do not"
    out = poisoned(oracle.shape, case.dtype, device)
    assert run(case, given, out) is out
    assert_exact(out, oracle)


@pytest.mark.interpret
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_geometry(data, guarded, poisoned, assert_exact):
    small, pair = st.integers(1, 3), lambda low, high: st.tuples(*[st.integers(low, high)] * 2)
    groups = data.draw(small)
    taps, dilation, padding = data.draw(pair(1, 3)), data.draw(pair(1, 2)), data.draw(pair(0, 2))
    sizes = [
        data.draw(st.integers(max(1, d * (t - 1) + 1 - 2 * p), 7))
        for t, d, p in zip(taps, dilation, padding, strict=True)
    ]
    case = Case(
        "any",
        (data.draw(small), *sizes, groups * data.draw(st.integers(1, 17))),
        groups * data.draw(st.integers(1, 17)),
        taps,
        data.draw(pair(1, 3)),
        padding,
        dilation,
        groups,
        residual=data.draw(st.sampled_from([None, INT8, HALF])),
        dtype=data.draw(st.sampled_from([INT8, FP32])),
        activation=data.draw(st.sampled_from([None, "relu"])),
        tile=SMALL,
    )
    cpu = torch.device("cpu")
    drawn = operands(case, cpu, guarded)
    out = poisoned((case.shape().n, case.shape().p, case.shape().q, case.k), case.dtype, cpu)
    run(case, drawn, out)
    assert_exact(out, meaning(case, drawn))


@pytest.mark.parametrize("kind", ["silu", "sigmoid", "gelu", "hardswish"])
def test_other_activations_are_a_step_off_at_most(kind, device, guarded, poisoned):
    """Exponentials differ in their last bits between libraries."""
    case = Case(kind, (1, 5, 5, 32), 32, residual=INT8, activation=kind)
    given = operands(case, device, guarded)
    out = run(case, given, poisoned((1, 5, 5, 32), INT8, device)).cpu().int()
    wrong = (out - meaning(case, given).int()).abs()
    assert wrong.max() <= 1 and (wrong > 0).double().mean() < 0.01


def test_ties_go_to_even_and_the_ends_saturate(device, poisoned):
    """Every accumulator from -300 to 300, halved: each second one lies between two integers."""
    acc = torch.arange(-300, 301)
    x = torch.zeros(1, 1, 601, 8, dtype=INT8)
    x[0, 0, :, 0] = (acc // 3).to(INT8)  # 3 a + b makes any sum of int8
    x[0, 0, :, 1] = (acc % 3).to(INT8)
    weight = torch.tensor([3, 1, 0, 0, 0, 0, 0, 0], dtype=INT8).view(1, 1, 1, 8)
    scale = torch.tensor([0.5], device=device)
    out = poisoned((1, 1, 601, 1), INT8, device)
    conv2d(x.to(device), weight.to(device), scale=scale, out=out)
    exact = acc.double() / 2
    expected = torch.where(exact % 1 == 0.5, 2 * (exact / 2).round(), exact).clamp(-128, 127)
    assert torch.equal(out.flatten().cpu().double(), expected)
    assert (exact % 1 == 0.5).sum() == 300 and (expected == -128).sum() == 46


def test_every_step_is_rounded_by_itself(device, poisoned):
    """acc * scale + bias as one fused operation would be 2**-24; as two it is 0."""
    x = torch.full((1, 1, 1, 32), 0, dtype=INT8, device=device)
    weight = torch.zeros((1, 1, 1, 32), dtype=INT8, device=device)
    x[..., 0], weight[..., 0] = 3, 1
    third = torch.tensor([1 / 3], dtype=FP32)
    assert 3 * third.double() + -1.0 != 0 and 3 * third + -1.0 == 0
    out = poisoned((1, 1, 1, 1), FP32, device)
    conv2d(x, weight, torch.tensor([-1.0], device=device), scale=third.to(device), out=out)
    assert out.item() == 0.0


def test_the_largest_sums_are_exact(device, poisoned, assert_exact):
    """Sums beyond 2**24 are exact in int32 and would not be in fp32."""
    x = torch.full((1, 1, 1, 2048), -128, dtype=INT8, device=device)
    weight = torch.full((16, 1, 1, 2048), -128, dtype=INT8, device=device)
    weight[0, 0, 0, 0] = -127
    out = poisoned((1, 1, 1, 16), FP32, device)
    bias = torch.full((16,), -(2.0**25), device=device)
    conv2d(x, weight, bias, scale=torch.ones(16, device=device), out=out)
    assert out.flatten().tolist() == [-128.0] + [0.0] * 15


@dataclass(frozen=True)
class ResidualCase:
    """A residual cut out of a wider tensor: shortcut A of the ResNet paper, and its kin."""

    name: str
    channels: int
    offset: int
    step: int


@pytest.mark.parametrize(
    "case",
    [
        ResidualCase("shortcut-a", channels=16, offset=0, step=2),
        ResidualCase("shortcut-a-centred", channels=16, offset=8, step=2),
        ResidualCase("last-channels", channels=5, offset=27, step=1),
    ],
    ids=lambda case: case.name,
)
def test_residual_view_with_offset(case, device, guarded, poisoned, assert_exact):
    conv = Case("conv", (2, 5, 5, 16), 32, (3, 3), padding=(1, 1), residual=INT8)
    given = operands(conv, device, guarded)
    random = torch.Generator().manual_seed(1)
    size = 5 * case.step
    source = torch.randint(-128, 128, (2, size, size, case.channels), generator=random, dtype=INT8)
    residual = guarded(source.to(device))[:, :: case.step, :: case.step]
    padded = torch.zeros(2, 5, 5, 32, dtype=INT8)
    padded[..., case.offset : case.offset + case.channels] = residual.cpu()
    out = poisoned((2, 5, 5, 32), INT8, device)
    conv2d(
        given.x,
        given.weight,
        given.bias,
        scale=given.scale,
        residual=residual,
        residual_channel_offset=case.offset,
        out=out,
        **conv.options(),
    )
    assert_exact(out, meaning(conv, replace(given, residual=padded)))


def test_reads_strided_input(device, guarded, poisoned, assert_exact):
    case = Case("view", (2, 4, 4, 16), 32, (3, 3), padding=(1, 1))
    random = torch.Generator().manual_seed(1)
    wide = torch.randint(-128, 128, (2, 8, 8, 24), generator=random, dtype=INT8)
    x = guarded(wide.to(device))[:, ::2, 1::2, 8:]
    given = replace(operands(case, device, guarded), x=x)
    out = poisoned((2, 4, 4, 32), INT8, device)
    run(case, given, out)
    assert_exact(out, meaning(case, given))


@pytest.mark.parametrize("dtype", [HALF, FP32])
def test_fp8_products_are_exact_where_sums_are_small(dtype, device, poisoned):
    """fp8 to a float: halves up to 3.5, whose sums fp32 holds. (The interpreter rounds to fp8
    wrongly, so 8-bit results are for a GPU.)"""
    random = torch.Generator().manual_seed(0)
    x = (torch.randint(-7, 8, (2, 5, 5, 32), generator=random) / 2).to(FP8)
    weight = (torch.randint(-7, 8, (16, 3, 3, 32), generator=random) / 2).to(FP8)
    scale = 2.0 ** torch.randint(-4, 2, (16,), generator=random).float()
    out = poisoned((2, 5, 5, 16), dtype, device)
    conv2d(
        x.to(device), weight.to(device), scale=scale.to(device), padding=(1, 1), out=out, tile=SMALL
    )
    wide = (t.float().permute(0, 3, 1, 2) for t in (x, weight))
    y = torch.nn.functional.conv2d(*wide, padding=1) * scale.view(1, -1, 1, 1)
    assert torch.equal(out.cpu(), y.permute(0, 2, 3, 1).to(dtype))


@pytest.mark.gpu
def test_fp8_saturates(poisoned):
    device = torch.device("cuda")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs fp8, sm_89 or newer")
    x = torch.linspace(-30, 30, 64 * 32, device=device).view(1, 8, 8, 32).to(FP8)
    weight = torch.eye(32, device=device).view(32, 1, 1, 32).to(FP8)
    scale = torch.full((32,), 1.0, device=device)
    out = poisoned((1, 8, 8, 32), FP8, device)
    conv2d(x, weight, scale=scale, out_scale=20.0, out=out)
    expected = (20 * x.float()).clamp(-448, 448).to(FP8)
    assert torch.equal(out.float(), expected.float()) and (out.float() == 448).any()


X, WEIGHT, SCALE = (
    torch.zeros(1, 4, 4, 32, dtype=INT8),
    torch.zeros(8, 1, 1, 32, dtype=INT8),
    torch.ones(8),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": None}, r"scale is missing, expected \[8\] fp32 for operands of torch.int8"),
        ({"scale": SCALE[:4]}, r"scale has shape \[4\], expected \[8\]"),
        ({"scale": SCALE.half()}, "scale has dtype torch.float16, expected torch.float32"),
        ({"x": X.to(torch.uint8)}, "x has dtype torch.uint8, expected one of"),
        ({"weight": WEIGHT.half()}, "weight has dtype torch.float16, expected torch.int8"),
        ({"bias": SCALE.half()}, "bias has dtype torch.float16, expected torch.float32"),
        ({"residual_scale": 0.5}, "residual_scale is 0.5 with no residual"),
        ({"out_scale": 0.0}, "out_scale is 0.0, expected a positive number"),
        ({"out_scale": float("inf")}, "out_scale is inf"),
        ({"out_scale": 1e-40}, "out_scale is 1e-40, expected a positive number that is normal"),
        ({"out": torch.zeros(1, 4, 4, 8, dtype=FP8)}, "out has dtype torch.float8_e4m3fn"),
        ({"tile": ConvTile(16, 16, 16, 4, 2)}, "has a depth of 16, expected 32 for torch.int8"),
        ({"x": X.half(), "weight": WEIGHT.half()}, "is given for torch.float16; they are for 8"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "-".join(value),
)
def test_rejects(changes, message):
    given: dict[str, Any] = {"x": X, "weight": WEIGHT, "scale": SCALE} | changes
    with pytest.raises(ValueError, match=message):
        conv2d(given.pop("x"), given.pop("weight"), given.pop("bias", None), **given)


def test_fp8_needs_a_gpu_that_has_it():
    x, weight = X.to(FP8), WEIGHT.to(FP8)
    out = torch.zeros(1, 4, 4, 8, dtype=FP8)
    with pytest.raises(ValueError, match="sm_80, expected sm_89 or newer for fp8"):
        conv2d_launch(
            x,
            weight,
            None,
            None,
            out,
            shape=ConvShape(1, 4, 4, 32, 8, 1, 1),
            scale=SCALE,
            target=Target(80, 108),
        )


def test_sums_that_could_overflow_are_refused():
    x, weight = torch.zeros(1, 1, 1, 2**17, dtype=INT8), torch.zeros(8, 1, 1, 2**17, dtype=INT8)
    with pytest.raises(ValueError, match="131072 int8 products in a sum, expected at most 131071"):
        conv2d(x, weight, scale=SCALE)


def test_only_launches_of_8_bits_give_up_fused_arithmetic():
    shape, target = ConvShape(1, 4, 4, 32, 8, 1, 1), Target(90, 132)
    out = torch.zeros(1, 4, 4, 8, dtype=INT8)
    launch = conv2d_launch(X, WEIGHT, None, None, out, shape=shape, scale=SCALE, target=target)
    assert launch.options["enable_fp_fusion"] is False
    half = (X.half(), WEIGHT.half(), None, None, out.half())
    assert conv2d_launch(*half, shape=shape, target=target).options["enable_fp_fusion"] is True
