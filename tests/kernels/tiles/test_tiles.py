"""The tile choice: valid on every target, the same every time, sensible at both ends."""

import subprocess
import sys

import pytest

from fastres.kernels.cost import Cost, Target
from fastres.kernels.geometry import GemmShape
from fastres.kernels.tiles import (
    ConvTile,
    PoolTile,
    choose_conv_tile,
    choose_mean_tile,
    choose_pool_tile,
)
from fastres.kernels.tiles.conv import is_valid

SMS = (80, 86, 89, 90, 100, 120)
SHAPES = {
    "stem": GemmShape(256 * 112 * 112, 64, 147, 3),
    "layer1-3x3": GemmShape(256 * 56 * 56, 64, 576, 64),
    "layer4-1x1": GemmShape(256 * 49, 2048, 512, 512),
    "layer4-3x3-batch-1": GemmShape(49, 512, 4608, 512),
    "resnext": GemmShape(256 * 56 * 56, 4, 36, 4, groups=32),
    "depthwise": GemmShape(196, 1, 9, 1, groups=512),
    "fc-batch-1": GemmShape(1, 1000, 2048, 2048),
    "empty": GemmShape(0, 64, 576, 64),
}


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("itemsize", "tensor_cores"), [(1, True), (2, True), (4, True), (2, False), (4, False)]
)
def test_choice_is_valid_and_repeatable(sm, shape, itemsize, tensor_cores):
    target = Target.typical(sm)
    tile = choose_conv_tile(shape, itemsize, target, tensor_cores=tensor_cores)
    assert is_valid(tile, itemsize, tensor_cores, target)
    assert tile == choose_conv_tile(shape, itemsize, target, tensor_cores=tensor_cores)
    if shape.channels % 64 == 0:
        assert tile.stays_in_tap(shape.channels)


def test_large_layers_take_large_tiles_and_small_ones_fill_the_card():
    target = Target.typical(90)
    large = choose_conv_tile(SHAPES["layer4-1x1"], 2, target)
    assert large.block_m * large.block_n >= 128 * 128
    single = SHAPES["layer4-3x3-batch-1"]
    assert choose_conv_tile(single, 2, target).programs(single) >= 32


def test_eight_bits_take_steps_of_128_bytes_and_never_less_than_an_instruction():
    target = Target.typical(90)
    assert choose_conv_tile(SHAPES["layer4-1x1"], 1, target).block_k == 128
    assert choose_conv_tile(SHAPES["layer1-3x3"], 1, target).block_k == 64
    assert choose_conv_tile(SHAPES["depthwise"], 1, target).block_k == 32
    assert not is_valid(ConvTile(64, 64, 16, 4, 3), 1, True, target)
    assert is_valid(ConvTile(64, 64, 16, 4, 3), 2, True, target)


def test_narrow_outputs_take_narrow_tiles():
    assert choose_conv_tile(SHAPES["layer1-3x3"], 2, Target.typical(90)).block_n == 64


def test_invalid_tiles():
    big = ConvTile(128, 128, 64, 8, 4)
    assert is_valid(big, 2, True, Target.typical(90))
    assert not is_valid(big, 2, True, Target.typical(86)), "131072 bytes of shared memory"
    assert not is_valid(ConvTile(128, 128, 64, 4, 3), 2, True, Target.typical(90)), "registers"
    assert not is_valid(ConvTile(32, 64, 64, 4, 3), 2, True, Target.typical(90)), "no wgmma"
    assert is_valid(ConvTile(32, 64, 64, 4, 3), 2, True, Target.typical(80))
    assert not is_valid(big, 4, False, Target.typical(90)), "fp32 without tensor cores"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvTile(48, 64, 64, 4, 3), r"blocks are \(48, 64, 64\)"),
        (lambda: ConvTile(64, 64, 8, 4, 3), "at least 16"),
        (lambda: ConvTile(64, 64, 64, 3, 3), "num_warps is 3"),
        (lambda: ConvTile(64, 64, 64, 4, 0), "num_stages is 0"),
        (lambda: PoolTile(3, 64, 4), r"blocks are \(3, 64\)"),
        (lambda: Target(75, 40), "sm_75 is not supported"),
        (lambda: Target.typical(70), "sm_70 is not supported"),
        (lambda: Target(90, 0), "sm_count is 0"),
    ],
    ids=["blocks", "depth", "warps", "stages", "pool-blocks", "sm", "typical-sm", "sm-count"],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("sm", "limit"),
    [(80, 166_912), (86, 101_376), (87, 101_376), (89, 101_376), (90, 232_448), (103, 232_448)],
)
def test_shared_memory_limits(sm, limit):
    assert Target.typical(sm).shared_bytes == limit


@pytest.mark.parametrize(("channels", "itemsize"), [(64, 2), (2048, 4), (21, 2), (1, 4)])
def test_pool_tiles_give_every_thread_sixteen_bytes(channels, itemsize):
    tile = choose_pool_tile(channels, itemsize)
    if channels * itemsize >= 16:
        assert tile.block_m * tile.block_c * itemsize == 128 * 16
    assert choose_mean_tile(49, channels, itemsize).block_m <= 64
    assert tile.programs(1, channels) * tile.block_c >= channels


def test_costs_add():
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


def test_data_modules_import_no_triton():
    modules = ("epilogue", "reference", "cost", "tiles", "geometry", "folding")
    code = "import sys\n" + "".join(f"import fastres.kernels.{name}\n" for name in modules)
    code += "sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
