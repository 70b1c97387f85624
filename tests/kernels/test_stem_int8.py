"""Pictures quantised on their way in, the folded stem and its pool: the reference's bits."""

from dataclasses import dataclass

import pytest
import torch

from fastres.kernels import reference
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.folding import pack_stem_weight
from fastres.kernels.layout import cast, normalisation, to_nchw, to_nhwc, to_nhwc_launch
from fastres.kernels.space_to_depth import space_to_depth
from fastres.kernels.stem import stem
from fastres.kernels.stem_pool import stem_pool
from fastres.kernels.tiles import ConvTile, StemPoolTile

INT8, HALF, BF16, FP32, BYTE = torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.uint8
FP8 = torch.float8_e4m3fn
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OUT_SCALE = 1 / 0.0157  # the brightest and the darkest pixels saturate


def quantised(x: torch.Tensor, normalise: torch.Tensor | None, out_scale: float) -> torch.Tensor:
    """Three steps of fp32, each rounded by itself, for [N, C, H, W]."""
    v = x.cpu().float()
    if normalise is not None:
        scale, shift = normalise.cpu().view(2, 1, -1, 1, 1)
        v = v * scale
        v = v + shift
    return reference.requantise(v * torch.tensor(out_scale, dtype=FP32))


@dataclass(frozen=True)
class Picture:
    name: str
    source: torch.dtype
    normalised: bool = False
    nhwc: bool = False
    x: tuple[int, int, int, int] = (2, 3, 10, 12)
    channels: int = 3
    spare: int = 0

    def make(self, device: torch.device) -> torch.Tensor:
        random = torch.Generator().manual_seed(0)
        if self.source.is_floating_point:
            x = (1.1 * torch.randn(self.x, generator=random)).to(self.source)
            x = 255 * x.abs() if self.normalised else x
        else:
            low = -128 if self.source == INT8 else 0
            x = torch.randint(low, low + 256, self.x, generator=random).to(self.source)
        if self.nhwc:
            x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return x.to(device)

    def normalise(self, device: torch.device) -> torch.Tensor | None:
        return normalisation(MEAN, STD, device) if self.normalised else None

    def out_scale(self) -> float:
        bright = self.normalised or self.source.is_floating_point
        return OUT_SCALE if bright else {BYTE: 0.71, INT8: 1.42}[self.source]


PICTURES = (
    Picture("floats", FP32),
    Picture("halves", HALF),
    Picture("bf16", BF16),
    Picture("bytes", BYTE),
    Picture("int8", INT8),
    Picture("bytes-normalised", BYTE, True),
    Picture("bytes-nhwc-normalised", BYTE, True, True),
    Picture("floats-normalised", FP32, True),
    Picture("padded-channels", BYTE, True, channels=16),
    Picture("spare-pictures", BYTE, True, True, channels=4, spare=1),
    Picture("wide-map", HALF, x=(2, 70, 6, 8), channels=96),
    Picture("batch-0", BYTE, x=(0, 3, 8, 8), spare=1),
)


@pytest.mark.parametrize("case", PICTURES, ids=lambda case: case.name)
def test_to_nhwc_quantises(case, device, poisoned, assert_exact):
    n, c, h, w = case.x
    x = case.make(device)
    out = poisoned((n + case.spare, h, w, max(c, case.channels)), INT8, device)
    normalise = case.normalise(device)
    assert to_nhwc(x, normalise=normalise, out_scale=case.out_scale(), out=out) is out
    oracle = quantised(x, normalise, case.out_scale()).permute(0, 2, 3, 1)
    oracle = torch.nn.functional.pad(oracle, (0, out.shape[3] - c))
    assert (out[n:] == -128).all(), "pictures beyond the batch were touched"
    assert_exact(out[:n], oracle)
    if n > 0:
        assert 0 < (oracle == 127).sum() < oracle.numel() / 2, "some saturate, most do not"


@pytest.mark.parametrize(
    "case", [case for case in PICTURES if case.x[1] == 3], ids=lambda case: case.name
)
def test_folding_quantises(case, device, poisoned, assert_exact):
    n, c, h, w = case.x
    x = case.make(device)
    out = poisoned((n + case.spare, h // 2 + 3, w // 2 + 3, 16), INT8, device)
    normalise = case.normalise(device)
    space_to_depth(x, normalise=normalise, out_scale=case.out_scale(), out=out)
    y = quantised(x, normalise, case.out_scale())
    y = (
        y.view(n, c, h // 2, 2, w // 2, 2)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(n, h // 2, w // 2, 4 * c)
    )
    assert (out[n:] == -128).all(), "pictures beyond the batch were touched"
    assert_exact(out[:n], torch.nn.functional.pad(y, (0, 4, 2, 1, 2, 1)))


@pytest.mark.parametrize("dtype", [FP32, HALF, BF16])
@pytest.mark.parametrize("x", [(2, 5, 7, 70), (1, 4, 4, 3), (0, 4, 4, 3)], ids=str)
def test_to_nchw_turns_int8_back(x, dtype, device, guarded, poisoned, assert_exact):
    q = torch.randint(-128, 128, x, generator=torch.Generator().manual_seed(0)).to(INT8)
    out = poisoned((x[0], x[3], x[1], x[2]), dtype, device)
    to_nchw(guarded(q.to(device)), scale=0.0371, out=out)
    scale = torch.tensor(0.0371, dtype=FP32)
    assert_exact(out, reference.dequantise(q, 1.0).mul(scale).permute(0, 3, 1, 2))


def test_there_and_back_is_within_half_a_step(device):
    x = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
    scale = 1 / 127
    there = to_nhwc(x.to(device), dtype=INT8, out_scale=1 / scale)
    back = to_nchw(there, dtype=FP32, scale=scale).cpu()
    assert (back - x).abs().max() <= scale / 2 + 1e-6
    assert torch.equal(there.cpu().permute(0, 3, 1, 2), reference.quantise(x.double(), scale))


def test_cast_quantises_and_turns_back(device, poisoned, assert_exact):
    """Every half from -150 to 150: each second one lies between two integers."""
    x = (torch.arange(-300, 301) / 2).view(1, 601)
    q = cast((8 * x).to(device), dtype=INT8, scale=0.125)
    exact = x.double()
    expected = torch.where(exact % 1 == 0.5, 2 * (exact / 2).round(), exact).clamp(-128, 127)
    assert torch.equal(q.cpu().double(), expected)
    assert torch.equal(cast(q, dtype=FP32, scale=0.5).cpu().double(), expected / 2)


def test_only_8_bits_give_up_fused_arithmetic():
    x, out = torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, 3)
    assert to_nhwc_launch(x, out).fp_fusion and not to_nhwc_launch(x, out.to(INT8)).fp_fusion


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), 1e-42])
def test_rejects_scales(scale):
    x = torch.zeros(1, 4, 4, 3, dtype=INT8)
    with pytest.raises(ValueError, match="out_scale is .*, expected a positive number"):
        to_nhwc(x, dtype=INT8, out_scale=scale)
    with pytest.raises(ValueError, match="^scale is .*, expected a positive number"):
        to_nchw(x, dtype=FP32, scale=scale)


@dataclass(frozen=True)
class Case:
    name: str
    x: tuple[int, int, int, int] = (2, 3, 36, 40)  # N, C, H, W
    k: int = 64
    bias: bool = True
    activation: ActivationKind | None = "relu"
    out_scale: float = 1 / 0.021
    dtype: torch.dtype = INT8  # of the output
    tile: StemPoolTile | ConvTile | None = None


STEMS = (
    Case("imagenet", (1, 3, 56, 56)),
    Case("ragged", (3, 3, 30, 34)),
    Case("least", (2, 3, 2, 2)),
    Case("few-channels", (1, 3, 20, 20), k=16),
    Case("odd-channels", (1, 3, 20, 20), k=9),
    Case("four-channels", (1, 4, 20, 36)),
    Case("no-bias", (1, 3, 20, 20), bias=False),
    # below zero, so that a padding of zeros would win in the pool
    Case("no-activation", (1, 3, 20, 20), activation=None),
    Case("to-half", (1, 3, 20, 20), dtype=HALF, out_scale=1.0),
    Case("batch-0", (0, 3, 8, 8)),
)


def operands(case: Case, device: torch.device, embed):
    """Folded picture and filter, scale and bias; and the picture and the filter as they were."""
    random = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, case.x, generator=random).to(INT8)
    weight = torch.randint(-128, 128, (case.k, case.x[1], 7, 7), generator=random).to(INT8)
    scale = (0.5 + torch.rand(case.k, generator=random)) / (74.0**2 * (49 * case.x[1]) ** 0.5)
    bias = torch.randn(case.k, generator=random) - (0 if case.activation else 2)
    packed = embed(space_to_depth(x.to(device), dtype=INT8))
    packed_weight = embed(pack_stem_weight(weight).to(device))
    moved = embed(scale.to(device)), embed(bias.to(device)) if case.bias else None
    return packed, packed_weight, *moved, x, weight


def meaning(case: Case, x, weight, scale, bias) -> torch.Tensor:
    return reference.conv2d_int8(
        x,
        weight,
        scale.cpu(),
        None if bias is None else bias.cpu(),
        stride=(2, 2),
        padding=(3, 3),
        activation=case.activation,
        out_scale=case.out_scale,
        dtype=case.dtype,
    )


@pytest.mark.parametrize(
    "case",
    [
        *STEMS,
        Case("to-fp32", (1, 3, 20, 20), dtype=FP32, out_scale=1.0),
        Case("deep-blocks", (1, 3, 20, 20), tile=ConvTile(64, 64, 128, 4, 2)),
    ],
    ids=lambda case: case.name,
)
def test_stem_has_the_bits_of_the_convolution(case, device, guarded, poisoned, assert_exact):
    packed, packed_weight, scale, bias, x, weight = operands(case, device, guarded)
    oracle = meaning(case, x, weight, scale, bias).permute(0, 2, 3, 1)
    out = poisoned(oracle.shape, case.dtype, device)
    options = {"activation": case.activation, "out_scale": case.out_scale, "tile": case.tile}
    assert stem(packed, packed_weight, bias, scale=scale, out=out, **options) is out
    assert_exact(out, oracle)


@pytest.mark.parametrize(
    "case",
    [
        *STEMS,
        Case("two-channel-blocks", (1, 3, 20, 20), k=72),
        Case("small-blocks", (1, 3, 20, 26), tile=StemPoolTile(4, 2, 16, 4, 3)),
    ],
    ids=lambda case: case.name,
)
def test_pooled_stem_has_the_bits_of_both(case, device, guarded, poisoned, assert_exact):
    packed, packed_weight, scale, bias, x, weight = operands(case, device, guarded)
    y = meaning(case, x, weight, scale, bias)
    oracle = reference.max_pool(y.double(), (3, 3), (2, 2), (1, 1)).to(case.dtype)
    oracle = oracle.permute(0, 2, 3, 1)
    if case.activation is None:
        assert (oracle < 0).double().mean() > 0.05, "a padding of zeros would win"
    out = poisoned(oracle.shape, case.dtype, device)
    options = {"activation": case.activation, "out_scale": case.out_scale, "tile": case.tile}
    assert stem_pool(packed, packed_weight, bias, scale=scale, out=out, **options) is out
    assert_exact(out, oracle)


@pytest.mark.parametrize("form", [stem, stem_pool])
def test_fp8_stems_are_exact_where_sums_are_small(form, device, poisoned):
    """Integers up to 7, whose sums fp32 and, after the scale, fp16 hold."""
    random = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (1, 3, 16, 16), generator=random).float()
    weight = torch.randint(-3, 4, (16, 3, 7, 7), generator=random).float()
    packed = space_to_depth(x.to(device), dtype=FP32).to(FP8)
    packed_weight = pack_stem_weight(weight).to(FP8).to(device)
    scale = torch.full((16,), 0.5, device=device)
    y = torch.nn.functional.conv2d(x, weight, stride=2, padding=3).div(2).relu()
    if form is stem_pool:
        y = torch.nn.functional.max_pool2d(y, 3, 2, 1)
    oracle = y.permute(0, 2, 3, 1)
    out = form(packed, packed_weight, scale=scale, out=poisoned(oracle.shape, HALF, device))
    assert torch.equal(out.cpu().float(), oracle)


def test_a_stem_of_8_bits_needs_scales():
    packed, weight = torch.zeros(1, 7, 7, 16, dtype=INT8), torch.zeros(16, 256, dtype=INT8)
    for form in (stem, stem_pool):
        with pytest.raises(ValueError, match=r"scale is missing, expected \[16\] fp32"):
            form(packed, weight)
    out = torch.zeros(1, 2, 2, 16)
    with pytest.raises(ValueError, match="out has dtype torch.float32, expected torch.int8 or"):
        stem_pool(packed, weight, scale=torch.ones(16), out=out)
