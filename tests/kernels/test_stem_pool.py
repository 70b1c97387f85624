from dataclasses import dataclass, replace

import pytest
import torch

from fastres.kernels import reference
from fastres.kernels.aot import compile_launch, fits, narrow_loads
from fastres.kernels.cost import Target
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.folding import pack_stem_weight, packed_shape, stem_shape
from fastres.kernels.pool import max_pool
from fastres.kernels.space_to_depth import space_to_depth
from fastres.kernels.stem import stem, stem_cost
from fastres.kernels.stem_pool import stem_pool, stem_pool_cost, stem_pool_launch
from fastres.kernels.tiles import StemPoolTile, choose_conv_tile, choose_stem_pool_tile
from fastres.kernels.tiles.conv import conv_seconds
from fastres.kernels.tiles.stem_pool import (
    pooled,
    stem_pool_candidates,
    stem_pool_refusal,
    stem_pool_seconds,
)

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    name: str
    x: tuple[int, int, int, int] = (2, 3, 36, 40)  # N, C, H, W
    k: int = 64
    dtype: torch.dtype = HALF
    bias: bool = True
    activation: ActivationKind | None = "relu"
    tile: StemPoolTile | None = None


CASES = (
    Case("imagenet", (1, 3, 56, 56)),
    Case("one-block", (2, 3, 28, 28)),
    Case("ragged", (3, 3, 30, 34)),
    Case("odd-map", (2, 3, 38, 22)),
    Case("bf16", (1, 3, 36, 40), dtype=BF16),
    Case("least", (2, 3, 2, 2)),
    Case("one-row", (1, 3, 2, 40)),
    Case("two-channel-blocks", (1, 3, 20, 20), k=72),
    Case("few-channels", (1, 3, 20, 20), k=8),
    Case("four-channels", (1, 4, 20, 36)),
    Case("no-bias", (1, 3, 20, 20), bias=False),
    # below zero, so that a padding of zeros would win
    Case("no-activation", (1, 3, 20, 20), activation=None),
    Case("silu", (1, 3, 20, 20), activation="silu"),
    Case("small-blocks", (1, 3, 20, 26), tile=StemPoolTile(4, 2, 16, 4, 3)),
    Case("batch-0", (0, 3, 8, 8)),
)


def operands(case: Case, device: torch.device, embed):
    """The folded picture, the folded filter and the bias; and picture and filter as they were."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(case.x, generator=random).to(case.dtype)
    weight = (torch.randn(case.k, case.x[1], 7, 7, generator=random) / 12).to(case.dtype)
    bias = torch.randn(case.k, generator=random) - (0 if case.activation else 4)
    packed = embed(space_to_depth(x.to(device), dtype=case.dtype))
    packed_weight = embed(pack_stem_weight(weight).to(device))
    return packed, packed_weight, embed(bias.to(device)) if case.bias else None, x, weight


def meaning(case: Case, x, weight, bias, dtype: torch.dtype) -> torch.Tensor:
    y = reference.conv2d(
        x.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.cpu().to(dtype),
        stride=(2, 2),
        padding=(3, 3),
        activation=case.activation,
    )
    return reference.max_pool(y, (3, 3), (2, 2), (1, 1)).permute(0, 2, 3, 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(case, device, guarded, poisoned, assert_parity):
    packed, packed_weight, bias, x, weight = operands(case, device, guarded)
    oracle = meaning(case, x, weight, bias, torch.float64)
    out = poisoned(oracle.shape, case.dtype, device)
    options = {"activation": case.activation, "tile": case.tile}
    assert stem_pool(packed, packed_weight, bias, out=out, **options) is out
    assert_parity(out, oracle, meaning(case, x, weight, bias, case.dtype))


def test_equals_stem_then_pool(device, guarded):
    """What is rounded, and where, is the same; sums may be taken in another order."""
    packed, weight, bias, *_ = operands(Case("both", (2, 3, 36, 24)), device, guarded)
    apart = max_pool(stem(packed, weight, bias), kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    together = stem_pool(packed, weight, bias)
    differ = (apart != together).sum()
    assert differ <= 0.01 * apart.numel()
    torch.testing.assert_close(together, apart, rtol=2e-3, atol=1e-3)


P = torch.zeros(2, 7, 9, 16, dtype=HALF)
W = torch.zeros(64, 256, dtype=HALF)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stem_pool(P[..., :8], W), r"packed has shape \[2, 7, 9, 8\]"),
        (lambda: stem_pool(P[:, :6, :6], W), "packed has strides .* contiguous"),
        (
            lambda: stem_pool(P.float(), W.float()),
            "pooled at once: elements have 4 bytes",
        ),
        (lambda: stem_pool(P, W[:, :128]), r"weight has shape \[64, 128\], expected \[64, 256\]"),
        (lambda: stem_pool(P, W[:0]), "weight has 0 output channels"),
        (lambda: stem_pool(P, W.bfloat16()), "weight has dtype torch.bfloat16, expected"),
        (lambda: stem_pool(P, W, torch.zeros(8)), r"bias has shape \[8\], expected \[64\]"),
        (lambda: stem_pool(P, W, out=P), r"expected \[2, 2, 3, 64\]"),
        (lambda: StemPoolTile(1, 8, 64), r"blocks are \(1, 8, 64\), expected powers of two"),
        (lambda: StemPoolTile(8, 6, 64), r"blocks are \(8, 6, 64\), expected powers of two"),
        (lambda: StemPoolTile(8, 8, 8), r"blocks are \(8, 8, 8\), expected powers of two"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_refusal_names_the_reason():
    assert stem_pool_refusal(112, 112, 2) is None
    assert "4 bytes" in stem_pool_refusal(112, 112, 4)
    assert "under 2**31" in stem_pool_refusal(2**14, 2**14, 2)


def test_cost():
    cost, alone = stem_pool_cost(1, 112, 112, 64, 2), stem_cost(1, 112, 112, 64, 2)
    assert cost.flops == alone.flops + 9 * 56 * 56 * 64
    assert cost.bytes == alone.bytes - 2 * 64 * (112 * 112 - 56 * 56)


def test_blocks_cover_imagenet_without_waste():
    tile = choose_stem_pool_tile(64)
    assert tile.programs(256, 112, 112, 64) == 256 * 8 * 8
    assert pooled(112) == 56 == 8 * (tile.block_p - 1)


def test_estimated_to_take_less_than_stem_and_pool():
    n, target = 256, Target.typical(90)
    shape = stem_shape(n, 112, 112, 64)
    tile = choose_conv_tile(shape.gemm, 2, target)
    apart = conv_seconds(tile, shape.gemm, 2, target, True)
    apart += 2 * n * 64 * (112 * 112 + 56 * 56) / target.dram_bytes
    assert stem_pool_seconds(choose_stem_pool_tile(64), shape, 2, target) < apart


def launch_of(n: int, dtype: torch.dtype, tile: StemPoolTile | None = None):
    def meta(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    packed, out = meta(*packed_shape(n, 224, 224)), meta(n, 56, 56, 64)
    return stem_pool_launch(packed, meta(64, 256), meta(64, dtype=FP32), out, tile=tile)


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [HALF, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("sm", [80, 86, 90, 100])
def test_machine_code(sm, dtype):
    launch = launch_of(256, dtype)
    facts = compile_launch(launch, sm)
    assert (facts.spill_stores, facts.spill_loads) == (0, 0)
    assert fits(facts, sm)
    assert facts.shared_bytes <= choose_stem_pool_tile(64).product.shared_bytes(2) + 64
    assert facts.count("LDGSTS", "128") > 0 and facts.count("STG", "128") > 0
    assert narrow_loads(launch, facts) == facts.count("STG", "U16") == 0
    matrix = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[sm]
    assert {name.split(".")[0] for name in facts.instructions if "MMA" in name} == {matrix}


@pytest.mark.compile
@pytest.mark.parametrize("rank", range(0, 24, 6))
@pytest.mark.parametrize("sm", [80, 90])
def test_other_tiles_compile(sm, rank):
    target, shape = Target.typical(sm), stem_shape(256, 112, 112, 64)
    tiles = sorted(
        stem_pool_candidates(shape, 2, target),
        key=lambda tile: stem_pool_seconds(tile, shape, 2, target),
    )
    facts = compile_launch(launch_of(256, HALF, tiles[rank]), sm)
    assert facts.spill_stores == 0 and fits(facts, sm)


@pytest.mark.compile
def test_large_pictures_compile():
    launch = launch_of(1, HALF)
    arguments = {**launch.arguments, "P": 2**13 + 5, "Q": 2**13 + 3}
    assert compile_launch(replace(launch, arguments=arguments), 90).spill_stores == 0
