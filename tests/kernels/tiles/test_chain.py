"""The chain's sizes, costs, refusals and tile choice: pure arithmetic."""

from dataclasses import replace

import pytest

from fastres.kernels.cost import Target
from fastres.kernels.geometry import GemmShape
from fastres.kernels.tiles import ChainTile, choose_chain_tile
from fastres.kernels.tiles.chain import (
    ChainShape,
    chain_candidates,
    chain_cost,
    chain_seconds,
    is_valid,
    refusal,
)

H200 = Target.typical(90)
CONV2_X = ChainShape(256, 56, 56, 64, 256, 64)
CONV3_X = ChainShape(256, 28, 28, 128, 512, 128)
HEAD = ChainShape(256, 56, 56, 128, 512, 128, projected=256, stride=2, shortcut_stride=2)
SHAPES = {"conv2_x": CONV2_X, "conv3_x": CONV3_X, "head": HEAD}


@pytest.mark.parametrize("sm", [90, 100, 120])
@pytest.mark.parametrize("batch", [0, 1, 8, 256])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_choice_is_valid_and_repeatable(sm, batch, shape):
    target, shape = Target.typical(sm), replace(shape, n=batch)
    tile = choose_chain_tile(shape, 2, target)
    assert is_valid(tile, shape, 2, target)
    assert tile == choose_chain_tile(shape, 2, target)
    assert all(
        chain_seconds(tile, shape, 2, target) <= chain_seconds(other, shape, 2, target)
        for other in chain_candidates(shape, 2, target)
    )


def test_large_batches_take_large_boxes_and_one_image_fills_more_sms():
    assert choose_chain_tile(CONV2_X, 2, H200).pixels >= 128
    single = replace(CONV2_X, n=1)
    tile = choose_chain_tile(single, 2, H200)
    assert tile.box[0] == 1 and tile.programs(single) >= 49


def test_boxes_cover_ragged_outputs():
    tile = ChainTile((2, 8, 8), 4, 3, 2)
    assert tile.programs(ChainShape(3, 9, 8, 64, 64)) == 2 * 2 * 1
    assert tile.programs(ChainShape(4, 32, 32, 64, 64, stride=2)) == 2 * 2 * 2
    assert tile.programs(ChainShape(0, 9, 8, 64, 64)) == 0


def test_cost_counts_each_operand_once():
    cost = chain_cost(ChainShape(2, 4, 4, 64, 256, 128), 2)
    assert cost.flops == 2 * 32 * (9 * 64 * 64 + 256 * 64 + 256 * 128)
    assert cost.bytes == 2 * (32 * (64 + 256 + 256 + 128) + 9 * 64 * 64 + 256 * (64 + 128))
    head = chain_cost(ChainShape(1, 4, 4, 64, 128, 0, 64, 2, 2), 2)
    assert head.bytes == 2 * (16 * 64 + 4 * (64 + 128) + 9 * 64 * 64 + 128 * 128)


def test_products_of_separate_kernels_add_up():
    for shape in SHAPES.values():
        products = sum(2 * gemm.m * gemm.n * gemm.k for gemm in shape.gemms)
        assert products == chain_cost(shape, 2).flops
    assert CONV2_X.gemms[0] == GemmShape(256 * 56 * 56, 64, 576, 64)


@pytest.mark.parametrize(
    ("changes", "itemsize", "sm", "words"),
    [
        ({}, 2, 90, None),
        ({}, 2, 120, None),
        ({}, 2, 89, "sm_89 has no copy engine for boxes"),
        ({}, 4, 90, "elements have 4 bytes; only fp16, bf16"),
        ({"mid": 256, "ko": 1024}, 2, 90, "the 3x3 has 256 channels"),
        ({"mid": 48}, 2, 90, "the 3x3 has 48 channels"),
        ({"ko": 200}, 2, 90, "out has 200 channels"),
        ({"next_mid": 96}, 2, 90, "next_mid is 96"),
        ({"projected": 32}, 2, 90, "projected is 32"),
        ({"h": 57, "stride": 2}, 2, 90, "57x56 is odd"),
        ({"next_mid": 2048}, 2, 90, "no tile fits sm_90's 232448 bytes"),
    ],
    ids=str,
)
def test_refusals(changes, itemsize, sm, words):
    target, shape = Target.typical(sm), replace(CONV2_X, **changes)
    reason = refusal(shape, itemsize, target)
    assert reason is None if words is None else words in reason
    if words is not None:
        with pytest.raises(ValueError, match=words):
            choose_chain_tile(shape, itemsize, target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 8, 7), 4, 3, 2), r"box is \(2, 8, 7\)"),
        (((512, 1, 1), 4, 3, 2), "at most 256 pixels along a side"),
        (((1, 2, 4), 4, 3, 2), r"box \(1, 2, 4\) has 8 pixels"),
        (((2, 8, 8), 4, 3, 2, 32), "the chunk 32 channels"),
        (((2, 8, 8), 2, 3, 2), "num_warps is 2, expected 4 or 8"),
        (((2, 8, 8), 4, 0, 2), "num_stages is 0 and chunk_stages 2"),
    ],
)
def test_invalid_tiles(arguments, message):
    with pytest.raises(ValueError, match=message):
        ChainTile(*arguments)


def test_too_many_pixels():
    with pytest.raises(ValueError, match="output pixels, expected under"):
        replace(CONV2_X, n=2**20)
