from dataclasses import dataclass, replace

import pytest
import torch

from fastres.kernels import reference
from fastres.kernels.aot import compile_launch, fits, narrow_loads
from fastres.kernels.aot.cases import stem_cases
from fastres.kernels.folding import pack_stem_weight, packed_shape, stem_refusal
from fastres.kernels.layout import normalisation
from fastres.kernels.space_to_depth import space_to_depth, space_to_depth_launch
from fastres.kernels.stem import stem, stem_cost
from fastres.kernels.tiles import ConvTile, PoolTile

HALF, BF16, FP32, BYTE = torch.float16, torch.bfloat16, torch.float32, torch.uint8
MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.25)
SMALL = ConvTile(32, 16, 32, 4, 2)


@dataclass(frozen=True)
class Case:
    name: str
    x: tuple[int, int, int, int] = (2, 3, 10, 14)  # N, C, H, W
    source: torch.dtype = FP32
    dtype: torch.dtype = HALF
    nhwc: bool = False
    normalised: bool = False
    k: int = 64
    spare: int = 0  # pictures of out beyond x's
    tile: ConvTile | None = None
    allow_tf32: bool = False


CASES = (
    Case("imagenet", (1, 3, 32, 32)),
    Case("ragged", (3, 3, 10, 14)),
    Case("half", source=HALF),
    Case("bf16", source=BF16, dtype=BF16),
    Case("fp32", dtype=FP32, tile=SMALL),
    Case("tf32", dtype=FP32, allow_tf32=True),
    Case("channels-last", nhwc=True),
    Case("bytes", source=BYTE, normalised=True),
    Case("bytes-nhwc", source=BYTE, nhwc=True, normalised=True),
    Case("bytes-nhwc-bf16", source=BYTE, dtype=BF16, nhwc=True, normalised=True),
    Case("grey", (2, 1, 8, 8), k=8, tile=SMALL),
    Case("four-channels", (1, 4, 6, 8), k=40, normalised=True),
    Case("least", (1, 3, 2, 2)),
    Case("spare-pictures", (1, 3, 8, 8), spare=2),
    Case("batch-0", (0, 3, 8, 8), spare=1),
)


def picture(case: Case, device: torch.device, embed) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    if case.source == BYTE:
        values = torch.randint(0, 256, case.x, generator=random, dtype=BYTE)
    else:
        values = torch.randn(case.x, generator=random).to(case.source)
    if case.nhwc:
        values = values.permute(0, 2, 3, 1).contiguous()
    values = values.to(device)
    values = values if case.source == BYTE else embed(values)  # bytes have no NaN to lie between
    return values.permute(0, 3, 1, 2) if case.nhwc else values


def scales(case: Case, device: torch.device | None = None) -> torch.Tensor | None:
    c = case.x[1]
    return normalisation(MEAN[:c], STD[:c], device) if case.normalised else None


def normal(case: Case, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The picture that PyTorch's convolution would see, [N, C, H, W] in `dtype`."""
    y = x.cpu().to(dtype)
    if case.normalised:
        scale, shift = scales(case).to(dtype).view(2, 1, -1, 1, 1)
        y = y * scale + shift
    return y


def folded(x: torch.Tensor) -> torch.Tensor:
    """What `space_to_depth` means."""
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return torch.nn.functional.pad(y, (0, 16 - 4 * c, 2, 1, 2, 1))


def unfolded(packed: torch.Tensor, c: int) -> torch.Tensor:
    """The picture [N, C, H, W] that was folded."""
    y = packed[:, 2:-1, 2:-1, : 4 * c]
    n, p, q, _ = y.shape
    return y.reshape(n, p, q, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, 2 * p, 2 * q)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_space_to_depth_matches_pytorch(case, device, guarded, poisoned, assert_parity):
    n, _, h, w = case.x
    x = picture(case, device, guarded)
    out = poisoned(packed_shape(n + case.spare, h, w), case.dtype, device)
    assert space_to_depth(x, normalise=scales(case, device), out=out) is out
    assert out[n:].isnan().all(), "pictures beyond the batch were touched"
    oracle = folded(normal(case, x, torch.float64))
    assert_parity(out[:n], oracle, folded(normal(case, x, FP32)).to(case.dtype))
    assert torch.equal(out[:n].cpu() == 0, oracle == 0), "the margin is not exactly zero"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stem_matches_convolution(case, device, guarded, poisoned, assert_parity):
    n, c, h, w = case.x
    random = torch.Generator().manual_seed(1)
    weight = (torch.randn(case.k, c, 7, 7, generator=random) / 12).to(case.dtype)
    bias = guarded(torch.randn(case.k, generator=random).to(device))
    x = picture(case, device, guarded)
    packed = space_to_depth(x, dtype=case.dtype, normalise=scales(case, device))
    if case.allow_tf32:  # as plans store it: tensor cores would cut off what is not rounded
        packed, weight = reference.round_tf32(packed), reference.round_tf32(weight)
    packed = guarded(packed)
    out = poisoned((n, h // 2, w // 2, case.k), case.dtype, device)
    packed_weight = guarded(pack_stem_weight(weight).to(device))
    options = {"tile": case.tile, "allow_tf32": case.allow_tf32}
    assert stem(packed, packed_weight, bias, out=out, **options) is out

    # the same rounded picture, unfolded: the product alone is compared
    seen = unfolded(packed.cpu(), c)

    def meaning(dtype: torch.dtype) -> torch.Tensor:
        y = reference.conv2d(
            seen.to(dtype),
            weight.to(dtype),
            bias.cpu().to(dtype),
            stride=(2, 2),
            padding=(3, 3),
            activation="relu",
        )
        return y.permute(0, 2, 3, 1)

    # TF32 keeps 10 bits of the fraction, as fp16 does
    assert_parity(out, meaning(torch.float64), meaning(HALF if case.allow_tf32 else case.dtype))


def test_end_to_end_as_pytorch_with_real_sizes(device):
    """A strip of a photograph's width, bytes to activations, against plain PyTorch."""
    random = torch.Generator().manual_seed(0)
    u = torch.randint(0, 256, (1, 8, 224, 3), generator=random, dtype=BYTE)
    weight = torch.randn(64, 3, 7, 7, generator=random) / 12
    mean, std = torch.tensor(MEAN[:3]).view(3, 1, 1), torch.tensor(STD[:3]).view(3, 1, 1)
    x = (u.permute(0, 3, 1, 2).double() / 255 - mean) / std
    expected = torch.nn.functional.conv2d(x, weight.double(), None, 2, 3).relu()
    normalise = normalisation(MEAN[:3], STD[:3], device)
    packed = space_to_depth(u.permute(0, 3, 1, 2).to(device), normalise=normalise)
    y = stem(packed, pack_stem_weight(weight).half().to(device))
    found = y.cpu().double().permute(0, 3, 1, 2)
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_many_blocks(device):
    x = torch.randn(2, 3, 18, 22)
    y = space_to_depth(x.to(device), dtype=FP32, tile=PoolTile(16, 16, 1))
    assert torch.equal(y.cpu(), folded(x))


X = torch.zeros(2, 3, 8, 8)
P = torch.zeros(2, 7, 7, 16)
W = torch.zeros(64, 256)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: space_to_depth(X[0]), r"x has shape \[3, 8, 8\], expected \[N, C, H, W\]"),
        (lambda: space_to_depth(X.double()), "x has dtype torch.float64"),
        (lambda: space_to_depth(X[:, :, :7]), "7x8 pixels, expected even numbers"),
        (lambda: space_to_depth(torch.zeros(1, 5, 8, 8)), "5 channels, expected 1 to 4"),
        (lambda: space_to_depth(X, out=P[:1]), r"out has shape \[1, 7, 7, 16\], expected \[>= 2"),
        (lambda: space_to_depth(X, out=P[:, :6]), r"expected \[>= 2, 7, 7, 16\]"),
        (lambda: space_to_depth(X, out=P.byte()), "out has dtype torch.uint8"),
        (lambda: space_to_depth(X, normalise=torch.zeros(2, 4)), r"normalise has shape \[2, 4\]"),
        (lambda: space_to_depth(X, tile=PoolTile(16, 8, 1)), "tile has 8 channels, expected 16"),
        (lambda: stem(P[..., :8], W), r"packed has shape \[2, 7, 7, 8\]"),
        (lambda: stem(P[:, :3], W), r"packed has shape \[2, 3, 7, 16\]"),
        (lambda: stem(P[:, :6, :6], W), "packed has strides .* contiguous"),
        (lambda: stem(P.byte(), W), "packed has dtype torch.uint8"),
        (lambda: stem(P, W[:, :128]), r"weight has shape \[64, 128\], expected \[64, 256\]"),
        (lambda: stem(P, W.half()), "weight has dtype torch.float16, expected torch.float32"),
        (lambda: stem(P, W, torch.zeros(8)), r"bias has shape \[8\], expected \[64\]"),
        (lambda: stem(P, W, out=P), r"out has shape \[2, 7, 7, 16\], expected \[2, 4, 4, 64\]"),
        (lambda: pack_stem_weight(torch.zeros(64, 3, 3, 3)), r"weight has shape \[64, 3, 3, 3\]"),
        (lambda: pack_stem_weight(torch.zeros(64, 5, 7, 7)), r"expected \[K, 1 to 4, 7, 7\]"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_refusal_names_the_reason():
    seven = ((7, 7), (2, 2), (3, 3))
    assert stem_refusal(3, 224, 224, *seven) is None
    assert "expected even numbers" in stem_refusal(3, 225, 224, *seven)
    assert "expected at most 2**29" in stem_refusal(3, 2**16, 2**15, *seven)
    assert "expected at most 2**29" in stem_refusal(3, 2, 2**30 - 2, *seven)
    assert "16" in stem_refusal(8, 224, 224, *seven)
    assert "expected 7x7" in stem_refusal(3, 224, 224, (3, 3), (2, 2), (1, 1))


def test_costs():
    x = torch.empty(1, 3, 224, 224, device="meta")
    out = torch.empty(packed_shape(1, 224, 224), dtype=HALF, device="meta")
    launch = space_to_depth_launch(x, out)
    assert launch.cost.bytes == 4 * 3 * 224 * 224 + 2 * 115 * 115 * 16
    cost = stem_cost(1, 112, 112, 64, 2)
    assert cost.flops == 2 * 112 * 112 * 64 * 256
    assert cost.bytes == 2 * (115 * 115 * 16 + 64 * 256 + 112 * 112 * 64)


CODE = [(sm, case) for sm in (80, 90) for case in stem_cases(sm)]


@pytest.mark.compile
@pytest.mark.parametrize(("sm", "case"), CODE, ids=[f"sm_{sm}-{case.name}" for sm, case in CODE])
def test_machine_code(sm, case):
    facts = compile_launch(case.launch, sm)
    assert (facts.spill_stores, facts.spill_loads) == (0, 0)
    assert fits(facts, sm)
    if "fold-" in case.name:
        assert facts.count("STG", "128") > 0 and facts.count("STG", "U16") == 0
    else:
        assert facts.count("LDGSTS") > 0
        assert narrow_loads(case.launch, facts) == facts.count("LDGSTS", "64") == 0
        matrix = {80: "HMMA", 90: "HGMMA"}
        assert facts.count(matrix[sm]) > 0 and facts.count(matrix[170 - sm]) == 0


@pytest.mark.compile
def test_strides_beyond_32_bits_compile():
    case = next(case for case in stem_cases(90) if "fold-" in case.name)
    arguments = {**case.launch.arguments, "stride_xn": 2**31, "stride_xc": 2**32}
    facts = compile_launch(replace(case.launch, arguments=arguments), 90)
    assert facts.spill_stores == 0 and facts.count("LDG", "64") > 0
