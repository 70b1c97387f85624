"""Boxes: valid on every target, exact where they can be, and what is refused says why."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fastres.kernels.cost import Target
from fastres.kernels.geometry import ConvShape
from fastres.kernels.tiles import BoxTile, choose_box_tile
from fastres.kernels.tiles.box_choice import box_candidates, box_seconds, box_work
from fastres.kernels.tiles.boxes import Projection, refusal, tile_refusal, walk_shape

HOPPER = Target.typical(90)
SAME = ((1, 1), (1, 1))  # stride and padding of a 3x3 that keeps the size
LAYERS = {
    "layer1-3x3": (56, 64, 64, 3, *SAME),
    "layer2-3x3": (28, 128, 128, 3, *SAME),
    "layer3-3x3": (14, 256, 256, 3, *SAME),
    "layer4-3x3": (7, 512, 512, 3, *SAME),
    "layer2-head": (56, 128, 128, 3, (2, 2), (1, 1)),
    "layer1-1x1": (56, 64, 256, 1, (1, 1), (0, 0)),
    "layer4-1x1": (7, 2048, 512, 1, (1, 1), (0, 0)),
    "downsample": (56, 256, 512, 1, (2, 2), (0, 0)),
}


def layer(name: str, n: int) -> ConvShape:
    size, c, k, taps, stride, padding = LAYERS[name]
    return ConvShape(n, size, size, c, k, taps, taps, stride, padding)


@pytest.mark.parametrize("sm", [90, 100, 120])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("n", [0, 1, 3, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_choice_is_valid_and_repeatable(sm, name, n, itemsize):
    shape, target = layer(name, n), Target.typical(sm)
    tile = choose_box_tile(shape, itemsize, target)
    assert tile_refusal(tile, shape, itemsize, target) is None
    assert tile == choose_box_tile(shape, itemsize, target)
    walk = walk_shape(shape)
    boxes = tile.boxes(walk)
    covered = (boxes[0] * tile.tn, boxes[1] * tile.th, boxes[2] * tile.tw)
    assert all(a >= b for a, b in zip(covered, (walk.n, walk.p, walk.q), strict=True))
    assert tile.programs(walk, target) <= tile.tiles(walk)


@pytest.mark.parametrize(
    ("name", "box"),
    [
        ("layer1-3x3", (2, 8, 8)),
        ("layer2-3x3", (8, 4, 4)),
        ("layer3-3x3", (32, 2, 2)),
        ("layer4-3x3", (128, 1, 1)),
        ("layer1-1x1", (1, 1, 128)),
    ],
)
def test_boxes_of_a_large_batch_waste_nothing(name, box):
    shape = layer(name, 256)
    tiles = [tile for tile in box_candidates(shape, 2, HOPPER) if tile.pixels == 128]
    assert {(tile.tn, tile.th, tile.tw) for tile in tiles} == {box}
    n, p, q = tiles[0].boxes(walk_shape(shape))
    assert n * p * q * 128 == 256 * shape.p * shape.q


def test_a_single_image_takes_small_boxes_and_splits_the_depth():
    shape = layer("layer4-3x3", 1)
    tile = choose_box_tile(shape, 2, HOPPER)
    assert tile.tn == 1 and tile.pixels <= 64
    assert tile.split_k > 1 and tile.tiles(walk_shape(shape)) >= 64
    whole = BoxTile(1, 8, 8, 64, 64, 4, 4)
    assert box_seconds(tile, shape, 2, HOPPER) < box_seconds(whole, shape, 2, HOPPER)


def test_who_adds_the_parts_depends_on_how_much_there_is_to_load():
    """A second kernel costs its launch, the last part's program what one SM loads by itself."""
    shape, tile = layer("layer4-3x3", 1), BoxTile(1, 4, 8, 64, 64, 4, 4, 8)

    def dearer(tile: BoxTile) -> float:
        ways = (replace(tile, last_adds=last) for last in (True, False))
        ours, theirs = (box_seconds(way, shape, 2, HOPPER) for way in ways)
        return ours - theirs

    assert dearer(tile) < 0 < dearer(replace(tile, th=8, split_k=12))
    loaded = 4 * (12 * 64 * 64 - 8 * 32 * 64)  # bytes
    more = dearer(replace(tile, th=8, split_k=12)) - dearer(tile)
    assert more == pytest.approx(loaded / (2 * HOPPER.l2_bytes), rel=0.1)
    assert str(replace(tile, last_adds=True)) == "(1,4,8)x64x64 w4 s4 split 8 last p1"


def test_a_large_batch_is_not_split():
    for name in LAYERS:
        tile = choose_box_tile(layer(name, 256), 2, HOPPER)
        assert tile.split_k == 1 and tile.pixels >= 128, name


def test_narrow_outputs_take_narrow_tiles():
    assert choose_box_tile(layer("layer1-3x3", 256), 2, HOPPER).block_n == 64


def test_estimate_counts_what_a_form_reads():
    shape, tile = layer("layer1-1x1", 256), BoxTile(1, 1, 128, 128, 64, 8, 1)
    plain, pixels = box_work(tile, shape, 2), 256 * 56 * 56
    assert plain.flops == 2 * pixels * 64 * 256 and plain.launches == 1
    assert plain.bytes == 2 * (pixels * (64 + 256) + 64 * 256)
    # two blocks of channels load every pixel, every box of 128 pixels loads the weights
    assert plain.l2 == 2 * (pixels * (2 * 64 + 256) + pixels // 128 * 64 * 256)
    added = box_work(tile, shape, 2, residual=True)
    assert added.bytes - plain.bytes == added.l2 - plain.l2 == 2 * pixels * 256
    wide = box_work(tile, shape, 1, residual=True, result_itemsize=2)
    assert wide.bytes == plain.bytes // 2 + 3 * pixels * 256
    merged = box_work(tile, shape, 2, Projection(64))
    assert merged.flops == 2 * plain.flops and merged.bytes < 2 * plain.bytes
    split = box_work(replace(tile, split_k=3), layer("layer1-3x3", 256), 2)
    whole = box_work(tile, layer("layer1-3x3", 256), 2)
    assert split.l2 - whole.l2 == 2 * 3 * 4 * pixels * 64 and split.launches == 2
    last = replace(tile, split_k=3, last_adds=True)
    added, walk = box_work(last, layer("layer1-3x3", 256), 2), walk_shape(layer("layer1-3x3", 256))
    # parts are whole boxes, also where these stick out of the picture
    assert added.l2 - whole.l2 == 2 * 4 * last.tiles(walk) * 128 * 128 and added.launches == 1
    for more in ({}, {"residual": True}):
        work = box_work(tile, shape, 2, **more)
        least = max(work.memory_seconds(HOPPER), work.l2_seconds(HOPPER))
        assert least < box_seconds(tile, shape, 2, HOPPER, **more) < 2 * least


def test_walk_of_pointwise_convolutions():
    stride_1, stride_2 = layer("layer1-1x1", 2), layer("downsample", 2)
    assert walk_shape(stride_1) == ConvShape(1, 1, 2 * 56 * 56, 64, 256, 1, 1)
    assert walk_shape(stride_1, Projection(64)) == walk_shape(stride_1)
    assert walk_shape(stride_1, Projection(64, (2, 2))) == stride_1
    assert walk_shape(stride_2) == ConvShape(2, 28, 28, 256, 512, 1, 1)
    conv = layer("layer2-head", 2)
    assert walk_shape(conv) is conv


HALF = torch.float16
POINT = ConvShape(1, 9, 9, 64, 64, 1, 1)


@pytest.mark.parametrize(
    ("shape", "dtype", "sm", "projection", "reason"),
    [
        (POINT, HALF, 90, None, None),
        (POINT, torch.bfloat16, 120, Projection(32, (2, 2)), None),
        (ConvShape(1, 9, 9, 64, 64, 1, 1, (3, 2)), HALF, 90, None, None),
        (ConvShape(1, 9, 9, 48, 8, 3, 5, (1, 1), (1, 0), (2, 1)), HALF, 90, None, None),
        (layer("layer2-head", 1), HALF, 90, None, None),
        (POINT, HALF, 89, None, "sm_89 has no copy engine"),
        (POINT, torch.float32, 90, None, "expected allow_tf32"),
        (POINT, torch.uint8, 90, None, "dtype is torch.uint8"),
        (ConvShape(1, 9, 9, 64, 64, 1, 1, groups=2), HALF, 90, None, "groups is 2"),
        (ConvShape(1, 9, 9, 24, 64, 1, 1), HALF, 90, None, "input channels are 24"),
        (POINT, HALF, 90, Projection(3), r"input channels are \(64, 3\)"),
        (ConvShape(1, 9, 9, 64, 12, 1, 1), HALF, 90, None, "output channels are 12"),
        (ConvShape(1, 8, 8, 64, 64, 3, 3, (3, 3)), HALF, 90, None, r"stride is \(3, 3\)"),
        (ConvShape(1, 8, 8, 64, 64, 3, 3, (2, 1)), HALF, 90, None, r"stride is \(2, 1\)"),
        (ConvShape(1, 8, 9, 64, 64, 3, 3, (2, 2)), HALF, 90, None, "stride is 2 over 8x9"),
    ],
    ids=str,
)
def test_refusal(shape, dtype, sm, projection, reason):
    target = Target.typical(sm)
    found = refusal(shape, dtype, target, projection)
    if reason is None:
        assert found is None
        assert box_candidates(shape, dtype.itemsize, target, projection)
    else:
        with pytest.raises(ValueError, match=reason):
            raise ValueError(found)


def test_tf32_on_request():
    assert refusal(POINT, torch.float32, HOPPER, allow_tf32=True) is None


@pytest.mark.parametrize(
    ("tile", "reason"),
    [
        (BoxTile(2, 8, 8, 128, 64, 8, 4), None),
        (BoxTile(2, 8, 8, 128, 64, 8, 4, split_k=9), None),
        (BoxTile(2, 8, 8, 128, 128, 8, 2), "a step of 128 channels does not divide 64"),
        (BoxTile(2, 8, 8, 128, 64, 8, 4, split_k=2), "split_k 2 does not divide 9 steps"),
        (BoxTile(4, 8, 8, 128, 64, 8, 4), "264192 bytes of shared memory, sm_90 has 232448"),
        (BoxTile(4, 8, 8, 128, 64, 4, 2), "256 accumulators a thread"),
        (BoxTile(2, 8, 8, 32, 64, 4, 2), "block_n is 32"),
    ],
    ids=str,
)
def test_tile_refusal(tile, reason):
    found = tile_refusal(tile, layer("layer1-3x3", 256), 2, HOPPER)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((3, 8, 8, 64, 64, 4, 3), r"the box is \(3, 8, 8\) with blocks of \(64, 64\) channels"),
        ((512, 1, 1, 64, 64, 4, 3), "at most 256"),
        ((1, 2, 4, 64, 64, 4, 3), "8 pixels, 64 and 64 channels a tile, expected at least 16"),
        ((1, 8, 8, 64, 8, 4, 3), "at least 16"),
        ((1, 8, 8, 64, 64, 2, 3), "num_warps is 2"),
        ((1, 8, 8, 64, 64, 4, 0), "num_stages is 0"),
        ((1, 8, 8, 64, 64, 4, 3, 0), "split_k 0"),
    ],
    ids=str,
)
def test_rejects(fields, message):
    with pytest.raises(ValueError, match=message):
        BoxTile(*fields)


def test_channels_no_step_divides():
    with pytest.raises(ValueError, match=r"\[24\] input channels, expected multiples of 16"):
        choose_box_tile(ConvShape(1, 9, 9, 24, 64, 1, 1), 2, HOPPER)


def test_imports_no_triton():
    code = "import sys, fastres.kernels.tiles.box_choice; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
