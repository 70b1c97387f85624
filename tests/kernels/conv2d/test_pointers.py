from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastres.kernels import reference
from fastres.kernels.conv2d import conv2d, conv2d_cost
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.geometry import ConvShape
from fastres.kernels.tiles import ConvTile

Pair = tuple[int, int]
SMALL = ConvTile(16, 16, 16, 4, 2)
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
    residual: bool = False
    activation: ActivationKind | None = "relu"
    dtype: torch.dtype = torch.float16
    tile: ConvTile | None = None
    allow_tf32: bool = False

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
        }


HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
CASES = (
    Case("stem", (2, 21, 18, 3), 64, (7, 7), (2, 2), (3, 3)),
    Case("stem-bf16", (1, 14, 14, 3), 64, (7, 7), (2, 2), (3, 3), dtype=BF16),
    Case("cifar-stem", (2, 8, 8, 3), 16, (3, 3), padding=(1, 1)),
    Case("layer1.0.conv1", (1, 14, 14, 64), 64),
    Case("layer1.0.conv2", (2, 9, 9, 64), 64, (3, 3), padding=(1, 1)),
    Case("layer1.0.conv2-bf16", (1, 9, 9, 64), 64, (3, 3), padding=(1, 1), dtype=BF16),
    Case("layer1.0.conv2-fp32", (1, 6, 6, 64), 64, (3, 3), padding=(1, 1), dtype=FP32),
    Case("layer1.0.conv3", (2, 7, 7, 64), 256, residual=True),
    Case("layer1.0.conv3-bf16", (2, 7, 7, 64), 256, residual=True, dtype=BF16),
    Case("layer2.0.conv2", (2, 10, 10, 128), 128, (3, 3), (2, 2), (1, 1), tile=WIDE),
    Case("layer2.0.downsample.0", (1, 8, 8, 256), 512, stride=(2, 2), activation=None),
    Case("layer4.1.conv2", (1, 7, 7, 512), 64, (3, 3), padding=(1, 1), tile=WIDE),
    Case("rn18-block", (2, 8, 8, 64), 64, (3, 3), padding=(1, 1), residual=True),
    Case("odd-sizes", (3, 5, 7, 20), 70, (3, 3), padding=(1, 1), residual=True),
    Case("odd-channels-fp32", (2, 5, 3, 7), 9, (3, 3), padding=(1, 1), dtype=FP32),
    Case("one-channel-each-way", (2, 5, 5, 1), 1, (3, 3), padding=(1, 1)),
    Case("stride-2-odd", (1, 9, 11, 32), 33, (3, 3), (2, 2), (1, 1)),
    Case("dilated", (1, 9, 9, 32), 32, (3, 3), padding=(2, 2), dilation=(2, 2)),
    Case("all-unequal", (2, 9, 8, 16), 24, (5, 3), (2, 1), (1, 2), (1, 2), tile=SMALL),
    Case("padding-beyond-filter", (1, 4, 4, 16), 16, padding=(2, 1)),
    Case("row-filter", (1, 6, 6, 16), 16, (1, 7), padding=(0, 3)),
    Case("resnext-32x4d", (1, 6, 6, 128), 128, (3, 3), padding=(1, 1), groups=32),
    Case("resnext-stride-2", (1, 7, 7, 64), 64, (3, 3), (2, 2), (1, 1), groups=4),
    Case("groups-uneven", (2, 5, 5, 48), 36, (3, 3), padding=(1, 1), groups=3, residual=True),
    Case("depthwise", (1, 6, 6, 16), 16, (3, 3), padding=(1, 1), groups=16),
    Case("no-bias", (1, 5, 5, 32), 32, bias=False),
    Case("residual-only", (1, 5, 5, 32), 32, bias=False, residual=True, activation=None),
    Case("tf32", (1, 5, 5, 32), 32, dtype=FP32, allow_tf32=True),
    Case("batch-0", (0, 7, 7, 64), 64, (3, 3), padding=(1, 1), residual=True),
    *(
        Case(kind, (1, 5, 5, 32), 32, residual=True, activation=kind)
        for kind in ("silu", "sigmoid", "gelu", "hardswish")
    ),
)


def nchw(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.cpu().to(dtype).permute(0, 3, 1, 2)


def meaning(
    case: Case,
    dtype: torch.dtype,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """The reference in NHWC, computed in `dtype`."""
    y = reference.conv2d(
        nchw(x, dtype),
        nchw(weight, dtype),
        None if bias is None else bias.cpu().to(dtype),
        residual=None if residual is None else nchw(residual, dtype),
        **case.options(),
    )
    return y.permute(0, 2, 3, 1)


def operands(case: Case, device: torch.device, embed: Callable[..., torch.Tensor]) -> Any:
    """x, weight, bias and residual, with sums of a size near one."""
    random = torch.Generator().manual_seed(0)
    shape = case.shape()

    def draw(*sizes: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        values = torch.randn(sizes, generator=random) * scale
        if case.allow_tf32:  # as plans store it: tensor cores would cut off what is not rounded
            values = reference.round_tf32(values)
        return embed(values.to(dtype).to(device))

    depth = shape.gemm.k
    x = draw(*case.x)
    weight = draw(case.k, *case.taps, case.x[3] // case.groups, scale=depth**-0.5)
    bias = draw(case.k, dtype=torch.float32) if case.bias else None
    residual = draw(shape.n, shape.p, shape.q, case.k) if case.residual else None
    return x, weight, bias, residual


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(case, device, guarded, poisoned, assert_parity):
    x, weight, bias, residual = operands(case, device, guarded)
    oracle = meaning(case, torch.float64, x, weight, bias, residual)
    out = poisoned(oracle.shape, case.dtype, device)
    given_out = conv2d(
        x,
        weight,
        bias,
        residual=residual,
        out=out,
        tile=case.tile,
        allow_tf32=case.allow_tf32,
        **case.options(),
    )
    assert given_out is out
    # TF32 keeps 10 bits of the fraction, as fp16 does
    baseline_dtype = torch.float16 if case.allow_tf32 else case.dtype
    baseline = meaning(case, baseline_dtype, x, weight, bias, residual)
    assert_parity(out, oracle, baseline)


@pytest.mark.interpret
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_geometry(data, guarded, poisoned, assert_parity):
    small, pair = st.integers(1, 3), lambda low, high: st.tuples(*[st.integers(low, high)] * 2)
    groups = data.draw(small)
    taps, dilation, padding = data.draw(pair(1, 3)), data.draw(pair(1, 2)), data.draw(pair(0, 2))
    sizes = [
        data.draw(st.integers(max(1, d * (t - 1) + 1 - 2 * p), 7))
        for t, d, p in zip(taps, dilation, padding, strict=True)
    ]
    c, k = groups * data.draw(st.integers(1, 17)), groups * data.draw(st.integers(1, 17))
    case = Case(
        "any",
        (data.draw(small), *sizes, c),
        k,
        taps,
        data.draw(pair(1, 3)),
        padding,
        dilation,
        groups,
        residual=data.draw(st.booleans()),
        tile=SMALL,
    )
    test_matches_reference(case, torch.device("cpu"), guarded, poisoned, assert_parity)


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
        ResidualCase("strided-all-channels", channels=32, offset=0, step=2),
    ],
    ids=lambda case: case.name,
)
def test_residual_view_with_offset(case, device, guarded, poisoned, assert_parity):
    conv = Case("conv", (2, 5, 5, 16), 32, (3, 3), padding=(1, 1))
    x, weight, bias, _ = operands(conv, device, guarded)
    random = torch.Generator().manual_seed(1)
    size = 5 * case.step
    source = torch.randn((2, size, size, case.channels), generator=random).to(HALF).to(device)
    residual = guarded(source)[:, :: case.step, :: case.step]
    padded = torch.zeros(2, 5, 5, 32, dtype=HALF)
    padded[..., case.offset : case.offset + case.channels] = residual.cpu()
    oracle = meaning(conv, torch.float64, x, weight, bias, padded)
    out = poisoned(oracle.shape, HALF, device)
    conv2d(
        x,
        weight,
        bias,
        residual=residual,
        residual_channel_offset=case.offset,
        out=out,
        **conv.options(),
    )
    assert_parity(out, oracle, meaning(conv, HALF, x, weight, bias, padded))


def test_reads_strided_input(device, guarded, poisoned, assert_parity):
    case = Case("view", (2, 4, 4, 16), 32, (3, 3), padding=(1, 1))
    _, weight, bias, _ = operands(case, device, guarded)
    random = torch.Generator().manual_seed(1)
    wide = guarded(torch.randn((2, 8, 8, 24), generator=random).to(HALF).to(device))
    x = wide[:, ::2, 1::2, 8:]
    oracle = meaning(case, torch.float64, x, weight, bias, None)
    out = poisoned(oracle.shape, HALF, device)
    conv2d(x, weight, bias, out=out, **case.options())
    assert_parity(out, oracle, meaning(case, HALF, x, weight, bias, None))


def test_relu_keeps_nan_where_pytorch_does(device, guarded, poisoned, assert_parity):
    case = Case("nan", (1, 6, 6, 16), 16, (3, 3), padding=(1, 1))
    x, weight, bias, _ = operands(case, device, guarded)
    x[0, 2, 3, 5] = float("nan")
    oracle = meaning(case, torch.float64, x, weight, bias, None)
    assert oracle.isnan().sum() == 9 * 16
    out = poisoned(oracle.shape, HALF, device)
    conv2d(x, weight, bias, out=out, **case.options())
    assert_parity(out, oracle, meaning(case, HALF, x, weight, bias, None))


def test_allocates_its_output(device):
    x = torch.ones((1, 4, 4, 16), dtype=HALF, device=device)
    y = conv2d(x, torch.ones((8, 2, 2, 16), dtype=HALF, device=device), stride=(2, 2))
    assert y.dtype == HALF and y.is_contiguous() and y.device.type == device.type
    assert torch.equal(y.cpu(), torch.full((1, 2, 2, 8), 64.0, dtype=HALF))


X = torch.zeros(1, 8, 8, 16)
W = torch.zeros(32, 3, 3, 16)
B = torch.zeros(32)
R = torch.zeros(1, 6, 6, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, r"x has shape \[8, 8, 16\], expected \[N, H, W, C\]"),
        ({"x": X.double()}, "x has dtype torch.float64"),
        ({"x": X.permute(0, 3, 1, 2)}, "x has stride 16 in its last dimension, expected 1"),
        ({"weight": W[0]}, r"weight has shape \[3, 3, 16\]"),
        ({"weight": W[..., :8]}, r"weight has shape \[32, 3, 3, 8\], expected \[32, 3, 3, 16\]"),
        ({"weight": W.half()}, "weight has dtype torch.float16, expected torch.float32"),
        ({"weight": W.to("meta")}, "weight is on meta, expected cpu"),
        ({"weight": torch.zeros(32, 3, 16, 3).mT}, "weight has strides .* contiguous"),
        ({"bias": B[:8]}, r"bias has shape \[8\], expected \[32\]"),
        ({"bias": B.half()}, "bias has dtype torch.float16, expected torch.float32"),
        ({"residual": R[:, :5]}, r"residual has shape \[1, 5, 6, 32\], expected \[1, 6, 6, 32\]"),
        ({"residual": R, "residual_channel_offset": 1}, "from output channel 1 on"),
        ({"residual": R[..., ::2]}, "residual has stride 2 in its last dimension"),
        ({"residual_channel_offset": 1}, "residual_channel_offset is 1 with no residual"),
        ({"out": R[..., :8]}, r"out has shape \[1, 6, 6, 8\]"),
        ({"out": R.half()}, "out has dtype torch.float16"),
        ({"groups": 3}, "groups is 3, expected a divisor of 16 and 32 channels"),
        ({"groups": 0}, "groups is 0"),
        ({"stride": (0, 1)}, r"stride is \(0, 1\)"),
        ({"padding": (-1, 0)}, r"padding \(-1, 0\)"),
        ({"dilation": (4, 1)}, r"3x3 filter with dilation \(4, 1\) does not fit into 8x8"),
        ({"x": torch.zeros(1, 8, 8, 0), "weight": torch.zeros(32, 3, 3, 0)}, "a size is zero"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "-".join(value),
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        conv2d(**{"x": X, "weight": W, "bias": B} | arguments)


def test_cost_of_resnet50_layers():
    assert conv2d_cost(ConvShape(1, 224, 224, 3, 64, 7, 7, (2, 2), (3, 3)), 2).flops == 236_027_904
    last = ConvShape(2, 7, 7, 512, 2048, 1, 1)
    cost = conv2d_cost(last, 2, residual_channels=2048)
    assert cost.flops == 2 * 2 * 49 * 512 * 2048
    assert cost.bytes == 2 * (2 * 49 * (512 + 2048 + 2048) + 512 * 2048)
