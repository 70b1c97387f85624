from dataclasses import dataclass, replace

import pytest
import torch

from fastres.kernels.aot import compile_launch, fits
from fastres.kernels.aot.cases import layout_cases
from fastres.kernels.layout import cast, normalisation, to_nchw, to_nhwc, to_nhwc_launch
from fastres.kernels.tiles import PoolTile

HALF, BF16, FP32, BYTE = torch.float16, torch.bfloat16, torch.float32, torch.uint8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Case:
    name: str
    x: tuple[int, int, int, int]  # N, C, H, W
    source: torch.dtype = FP32
    dtype: torch.dtype = HALF
    memory: str = "nchw"  # or "nhwc", or "view": every second row of a wider picture
    channels: int | None = None
    normalised: bool = False
    spare: int = 0  # pictures of out beyond x's
    tile: PoolTile | None = None


CASES = (
    Case("picture", (2, 3, 20, 18)),
    Case("picture-bf16", (1, 3, 9, 9), dtype=BF16),
    Case("picture-fp32", (2, 3, 16, 16), dtype=FP32),
    Case("half-to-fp32", (1, 5, 7, 3), HALF, FP32),
    Case("bf16-to-half", (1, 5, 7, 3), BF16),
    Case("channels-last", (2, 3, 8, 8), memory="nhwc"),
    Case("strided-rows", (2, 3, 5, 8), memory="view"),
    Case("wide-map", (2, 70, 9, 13), HALF),
    Case("one-pixel", (3, 40, 1, 1)),
    Case("padded-channels", (2, 3, 6, 6), channels=8),
    Case("bytes", (1, 3, 5, 6), BYTE),
    Case("bytes-normalised", (2, 3, 8, 10), BYTE, normalised=True),
    Case("bytes-nhwc-normalised", (2, 3, 7, 9), BYTE, memory="nhwc", normalised=True),
    Case("floats-normalised", (1, 3, 8, 8), FP32, FP32, normalised=True),
    Case("bytes-all", (2, 3, 8, 8), BYTE, BF16, "nhwc", channels=4, normalised=True, spare=1),
    Case("spare-pictures", (2, 3, 6, 6), spare=2),
    Case("many-tiles", (2, 5, 6, 7), tile=PoolTile(16, 4, 1)),
    Case("batch-0", (0, 3, 8, 8), spare=1),
)


def picture(case: Case, device: torch.device, embed) -> torch.Tensor:
    """x as the case wants it to lie in memory."""
    random = torch.Generator().manual_seed(0)
    n, c, h, w = case.x
    step = 2 if case.memory == "view" else 1
    sizes = (n, c, step * h, w)
    if case.source == BYTE:
        values = torch.randint(0, 256, sizes, generator=random, dtype=BYTE)
    else:
        values = torch.randn(sizes, generator=random).to(case.source)
    if case.memory == "nhwc":
        values = values.permute(0, 2, 3, 1).contiguous()
    values = values.to(device)
    values = values if case.source == BYTE else embed(values)  # bytes have no NaN to lie between
    return values.permute(0, 3, 1, 2) if case.memory == "nhwc" else values[:, :, ::step]


def scales(case: Case, device: torch.device) -> torch.Tensor | None:
    return normalisation(MEAN, STD, device) if case.normalised else None


def meaning(case: Case, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = x.cpu().to(dtype)
    if case.normalised:
        scale, shift = normalisation(MEAN, STD).to(dtype).view(2, 1, -1, 1, 1)
        y = y * scale + shift
    y = y.permute(0, 2, 3, 1)
    return torch.nn.functional.pad(y, (0, (case.channels or case.x[1]) - case.x[1]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_to_nhwc_matches_pytorch(case, device, guarded, poisoned, assert_parity):
    n, c, h, w = case.x
    x = picture(case, device, guarded)
    out = poisoned((n + case.spare, h, w, case.channels or c), case.dtype, device)
    given_out = to_nhwc(x, normalise=scales(case, device), out=out, tile=case.tile)
    assert given_out is out
    assert out[n:].isnan().all(), "pictures beyond the batch were touched"
    assert_parity(out[:n], meaning(case, x, torch.float64), meaning(case, x, FP32).to(case.dtype))
    if case.source == case.dtype and not case.normalised:
        assert torch.equal(out[:n].cpu(), meaning(case, x, case.dtype)), "a copy is exact"


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.normalised], ids=lambda c: c.name
)
def test_to_nchw_turns_back(case, device, guarded, poisoned, assert_parity):
    n, c, h, w = case.x
    x = picture(case, device, guarded).permute(0, 2, 3, 1)
    out = poisoned((n + case.spare, c, h, w), case.dtype, device)
    assert to_nchw(x, out=out, tile=case.tile) is out
    assert out[n:].isnan().all(), "pictures beyond the batch were touched"
    expected = x.cpu().permute(0, 3, 1, 2)
    assert_parity(out[:n], expected.double(), expected.to(case.dtype))


def test_normalises_as_pytorch_does(device):
    """(u/255 - mean) / std, from the formula and not from scale and shift."""
    u = torch.arange(256, dtype=BYTE).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    expected = ((u.double() / 255 - mean) / std).permute(0, 2, 3, 1)
    y = to_nhwc(u.to(device), dtype=FP32, normalise=normalisation(MEAN, STD, device))
    torch.testing.assert_close(y.cpu().double(), expected, rtol=0, atol=1e-6)


def test_keeps_nan_and_infinities(device):
    x = torch.randn(1, 3, 4, 4)
    x[0, 0, 1, 2], x[0, 1, 0, 0], x[0, 2, 3, 3] = float("nan"), float("inf"), float("-inf")
    y = to_nhwc(x.to(device), dtype=HALF).cpu()
    assert torch.equal(to_nchw(y.to(device)).cpu().nan_to_num(), x.half().nan_to_num())
    assert y.isnan().sum() == 1 and y.isinf().sum() == 2


@pytest.mark.parametrize("transposed", [False, True])
def test_cast(transposed, device, guarded):
    x = guarded(torch.randn(33, 21).to(device))
    x = x.T if transposed else x
    y = cast(x, dtype=HALF)
    assert y.is_contiguous() and torch.equal(y.cpu(), x.cpu().half())


X = torch.zeros(2, 3, 4, 4)
Y = torch.zeros(2, 4, 4, 3)
HUGE = torch.empty(2**31 - 1, 1, device="meta")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_nhwc(X[0]), r"x has shape \[3, 4, 4\], expected \[N, C, H, W\]"),
        (lambda: to_nhwc(X.double()), "x has dtype torch.float64"),
        (lambda: to_nhwc(X[:, :, :0]), r"x has shape \[2, 3, 0, 4\], only the batch may be zero"),
        (lambda: to_nhwc(X, channels=2), "out has 2 channels, expected at least x's 3"),
        (lambda: to_nhwc(X, dtype=BYTE), "out has dtype torch.uint8, expected torch.float16"),
        (lambda: to_nhwc(X, out=Y, channels=4), "expected 4 channels and dtype None"),
        (lambda: to_nhwc(X, out=Y[:1]), r"shape \[1, 4, 4, 3\], expected \[>= 2, 4, 4, any\]"),
        (lambda: to_nhwc(X, out=Y[:, :, :3]), r"expected \[>= 2, 4, 4, any\]"),
        (lambda: to_nhwc(X, out=Y[0]), r"out has shape \[4, 4, 3\]"),
        (lambda: to_nhwc(X, out=Y.to("meta")), "out is on meta, expected cpu"),
        (lambda: to_nhwc(X, out=torch.zeros(2, 3, 4, 4).permute(0, 2, 3, 1)), "out has strides"),
        (
            lambda: to_nhwc(X, normalise=torch.zeros(3)),
            r"normalise has shape \[3\], expected \[2, 3",
        ),
        (lambda: to_nhwc(X, normalise=torch.zeros(2, 3).half()), "normalise has dtype"),
        (lambda: to_nchw(Y[0]), r"x has shape \[4, 4, 3\], expected \[N, H, W, C\]"),
        (lambda: to_nchw(Y, out=Y), r"out has shape \[2, 4, 4, 3\], expected \[>= 2, 3, 4, 4\]"),
        (
            lambda: to_nchw(Y, out=X, dtype=HALF),
            "out has dtype torch.float32, expected torch.float16",
        ),
        (lambda: cast(X, dtype=HALF), r"x has shape \[2, 3, 4, 4\], expected \[M, C\]"),
        (lambda: cast(X[0, 0], dtype=BYTE), "out has dtype torch.uint8"),
        (lambda: cast(HUGE, dtype=HALF), "x has 1x2147483647 pixels an image"),
        (lambda: normalisation(MEAN, STD[:2]), "mean has 3 values and std 2"),
        (lambda: normalisation(MEAN, (1.0, 0.0, 1.0)), "expected positive values"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_cost():
    x = torch.empty(2, 3, 224, 224, device="meta")
    out = torch.empty(4, 224, 224, 3, dtype=HALF, device="meta")
    cost = to_nhwc_launch(x, out).cost
    assert cost.flops == 0 and cost.bytes == 2 * 3 * 224 * 224 * (4 + 2)


CODE = [(sm, case) for sm in (80, 90) for case in layout_cases()]


@pytest.mark.compile
@pytest.mark.parametrize(("sm", "case"), CODE, ids=[f"sm_{sm}-{case.name}" for sm, case in CODE])
def test_machine_code(sm, case):
    facts = compile_launch(case.launch, sm)
    assert (facts.spill_stores, facts.spill_loads) == (0, 0)
    assert fits(facts, sm)
    if case.name.startswith("map"):
        assert facts.count("LDG", "128") > 0 and facts.count("STG", "128") > 0
        assert facts.count("LDG", "U16") == 0 and facts.count("STG", "U16") == 0


@pytest.mark.compile
def test_strides_beyond_32_bits_compile():
    case = next(case for case in layout_cases() if case.name.startswith("map"))
    arguments = {**case.launch.arguments, "stride_xn": 2**31, "stride_yn": 2**33}
    facts = compile_launch(replace(case.launch, arguments=arguments), 90)
    assert facts.spill_stores == 0 and facts.count("LDG", "128") > 0
