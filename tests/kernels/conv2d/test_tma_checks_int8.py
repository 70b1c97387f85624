"""int8 convolutions through boxes without running them: what they refuse, and which tiles."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastres.kernels.conv2d import conv2d_tma, conv2d_tma_launches
from fastres.kernels.cost import Target
from fastres.kernels.geometry import ConvShape
from fastres.kernels.tiles import BoxTile, choose_box_tile
from fastres.kernels.tiles.box_choice import box_candidates
from fastres.kernels.tiles.boxes import Projection, refusal, tile_refusal, workspace_bytes

INT8, FP8 = torch.int8, torch.float8_e4m3fn
HOPPER = Target(90, 132)
SMALL = BoxTile(1, 4, 4, 64, 32, 4, 2)
SHAPE = ConvShape(1, 8, 8, 64, 64, 1, 1)


@pytest.mark.parametrize(
    ("shape", "dtype", "sm", "projection", "reason"),
    [
        (SHAPE, INT8, 90, None, None),
        (SHAPE, FP8, 120, Projection(32, (2, 2)), None),
        (SHAPE, INT8, 89, None, "sm_89 has no copy engine"),
        (SHAPE, torch.uint8, 90, None, "dtype is torch.uint8"),
        (ConvShape(1, 8, 8, 48, 64, 1, 1), INT8, 90, None, "input channels are 48, .* of 32"),
        (SHAPE, INT8, 90, Projection(16), r"input channels are \(64, 16\), .* of 32"),
        (ConvShape(1, 8, 8, 64, 24, 1, 1), FP8, 90, None, "output channels are 24, .* of 16"),
    ],
    ids=str,
)
def test_refusal(shape, dtype, sm, projection, reason):
    found = refusal(shape, dtype, Target.typical(sm), projection)
    if reason is None:
        assert found is None
        assert box_candidates(shape, 1, Target.typical(sm), projection)
    else:
        with pytest.raises(ValueError, match=reason):
            raise ValueError(found)


def test_tiles_of_8_bits():
    assert choose_box_tile(ConvShape(256, 14, 14, 256, 256, 3, 3), 1, HOPPER).block_k == 128
    merged = Projection(64)
    shape = ConvShape(256, 56, 56, 64, 256, 1, 1)
    assert all(tile.split_k == 1 for tile in box_candidates(shape, 1, HOPPER, merged))
    wide = BoxTile(1, 1, 128, 256, 64, 8, 3)
    assert tile_refusal(wide, shape, 1, HOPPER) is None
    assert "256 accumulators a thread" in str(tile_refusal(wide, shape, 1, HOPPER, merged))
    assert "split_k is 2" in str(tile_refusal(replace(SMALL, split_k=2), SHAPE, 1, HOPPER, merged))
    assert "block_k is 16" in str(tile_refusal(replace(SMALL, block_k=16), SHAPE, 1, HOPPER))
    big = BoxTile(1, 1, 128, 256, 128, 8, 3)
    deep = ConvShape(256, 14, 14, 256, 256, 1, 1)
    assert tile_refusal(big, deep, 1, HOPPER) is None
    assert "bytes of shared memory" in str(tile_refusal(big, deep, 1, HOPPER, None, 4))


X, WEIGHT, SCALE = (
    torch.zeros(1, 4, 4, 32, dtype=INT8),
    torch.zeros(16, 1, 1, 32, dtype=INT8),
    torch.ones(16),
)
X2: dict[str, Any] = {"x2": X, "weight2": torch.zeros(16, 32, dtype=INT8)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": None}, r"scale is missing, expected \[16\] fp32"),
        ({"scale": SCALE[:8]}, r"scale has shape \[8\], expected \[16\]"),
        (X2, "scale2 goes with an x2 of 8 bits"),
        ({"scale2": SCALE}, "scale2 goes with an x2 of 8 bits"),
        (X2 | {"scale2": SCALE[:8]}, r"scale2 has shape \[8\], expected \[16\]"),
        (X2 | {"x2": X.half()}, "x2 has dtype torch.float16"),
        ({"bias": SCALE.half()}, "bias has dtype torch.float16, expected torch.float32"),
        ({"out_scale": -1.0}, "out_scale is -1.0, expected a positive number"),
        ({"x": X.half(), "weight": WEIGHT.half()}, "is given for torch.float16"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "-".join(value),
)
def test_rejects(changes, message):
    given: dict[str, Any] = {"x": X, "weight": WEIGHT, "scale": SCALE, **changes}
    with pytest.raises(ValueError, match=message):
        conv2d_tma(given.pop("x"), given.pop("weight"), given.pop("bias", None), **given)


def test_the_workspace_of_int8_holds_int32():
    shape, tile = ConvShape(1, 4, 4, 64, 16, 1, 1), replace(SMALL, split_k=2)
    size = workspace_bytes(shape, tile) // 4
    with pytest.raises(ValueError, match="workspace has dtype torch.float32, expected torch.int32"):
        conv2d_tma_launches(
            torch.zeros(1, 4, 4, 64, dtype=INT8),
            torch.zeros(16, 64, dtype=INT8),
            None,
            None,
            torch.zeros(1, 4, 4, 16, dtype=INT8),
            shape=shape,
            target=HOPPER,
            scale=SCALE,
            tile=tile,
            workspace=torch.zeros(size),
        )
