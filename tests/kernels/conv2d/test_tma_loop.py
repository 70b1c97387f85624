"""One loop over tiles and their steps: where it is taken, the same bits, and the machine code."""

import re
from dataclasses import replace

import pytest
import torch

from fastres.kernels.aot import compile_kernel, facts_of, fits
from fastres.kernels.aot.cases import boxes_cases
from fastres.kernels.aot.cases_int8 import byte_cases
from fastres.kernels.aot.layers import BOXES
from fastres.kernels.conv2d import conv2d_tma_launches
from fastres.kernels.conv2d.tma import workspace_bytes
from fastres.kernels.cost import Target
from fastres.kernels.geometry import ConvShape
from fastres.kernels.tiles import BoxTile
from fastres.kernels.tiles.box_choice import box_candidates, box_seconds
from fastres.kernels.tiles.boxes import Projection, walk_shape

HALF, INT8, H200 = torch.float16, torch.int8, Target.typical(90)
SMALL = BoxTile(1, 4, 4, 64, 32, 4, 2)
SAME = ConvShape(1, 6, 6, 64, 72, 3, 3, padding=(1, 1))
HALVING = ConvShape(3, 8, 8, 64, 72, 3, 3, (2, 2), (1, 1))
POINT = ConvShape(3, 6, 6, 64, 72, 1, 1)  # two steps a tile
ONE_STEP = ConvShape(3, 6, 6, 32, 72, 1, 1)

# ---------------------------------------------------------------- where it is taken


@pytest.mark.parametrize(
    ("tile", "n", "projection", "residual", "expected"),
    [
        (BoxTile(16, 4, 4, 128, 64, 8, 3), 256, None, False, True),
        (BoxTile(16, 4, 4, 128, 64, 8, 3), 32, None, False, False),  # 98 tiles, one a program
        (BoxTile(16, 4, 4, 128, 64, 8, 1), 256, None, False, False),  # nothing is loaded ahead
        (BoxTile(16, 4, 4, 128, 64, 8, 3), 256, Projection(256), False, False),
        (BoxTile(16, 4, 4, 128, 64, 8, 3), 256, None, True, False),  # 280,576 bytes
        (BoxTile(16, 4, 4, 128, 64, 8, 2), 256, None, True, True),  # 231,424 bytes
        (BoxTile(8, 4, 4, 128, 64, 8, 2, programs_per_sm=2), 256, None, False, True),
        (BoxTile(8, 4, 4, 128, 64, 8, 2, programs_per_sm=2), 256, None, True, False),  # one fits
        (BoxTile(16, 4, 4, 128, 64, 8, 3, split_k=3), 256, None, True, True),  # added elsewhere
    ],
    ids=str,
)
def test_where_the_loops_are_one(tile, n, projection, residual, expected):
    walk = walk_shape(ConvShape(n, 28, 28, 128, 128, 3, 3, padding=(1, 1)))
    assert tile.flattens(walk, H200, 2, projection, residual=residual) is expected


def test_the_estimate_counts_one_fill_of_the_pipeline(monkeypatch):
    shape = ConvShape(256, 28, 28, 128, 128, 3, 3, padding=(1, 1))
    tile = BoxTile(16, 4, 4, 128, 64, 8, 3)
    one = box_seconds(tile, shape, 2, H200)
    monkeypatch.setattr(BoxTile, "flattens", lambda *_, **__: False)
    two = box_seconds(tile, shape, 2, H200)
    turns = tile.turns(walk_shape(shape), H200)
    assert turns == 6 and two - one == pytest.approx((turns - 1) * 0.8e-6)


def test_tiles_of_one_step_may_load_ahead():
    """The boxes of tiles to come: more stages than a tile has steps."""
    shape = ConvShape(256, 56, 56, 64, 64, 1, 1)
    stages = {tile.num_stages for tile in box_candidates(shape, 2, H200)}
    assert stages == {1, 2, 3, 4, 6}
    few = {tile.num_stages for tile in box_candidates(replace(shape, n=1), 2, H200)}
    assert few == {1}


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [HALF, INT8], ids=["fp16", "int8"])
@pytest.mark.parametrize(
    ("shape", "residual", "split_k"),
    [
        (SAME, False, 1),
        (SAME, False, 3),
        (HALVING, False, 1),
        (POINT, False, 1),
        (POINT, True, 1),
        (ONE_STEP, True, 1),
    ],
    ids=["3x3", "split", "stride-2", "1x1", "residual", "one-step"],
)
def test_the_same_bits_by_many_turns_as_by_one(
    shape, residual, split_k, dtype, device, guarded, poisoned
):
    """A card of two SMs against one with an SM for every tile."""
    random = torch.Generator().manual_seed(0)

    def draw(*sizes):
        whole = torch.randint(-99, 99, sizes, generator=random)
        return guarded((whole if dtype == INT8 else whole / 64).to(dtype).to(device))

    x = draw(shape.n, shape.h, shape.w, shape.c)
    weight = draw(shape.k, shape.r * shape.s * shape.c)
    added = draw(shape.n, shape.p, shape.q, shape.k) if residual else None
    k = shape.k - shape.k % 16
    if dtype == INT8:  # channels come in sixteens
        weight, shape = weight[:k].clone(), replace(shape, k=k)
        added = None if added is None else added[..., :k].contiguous()
    scale = torch.rand(shape.k, generator=random).to(device) / 500
    scales = {"scale": scale, "out_scale": 3.0} if dtype == INT8 else {}
    if dtype == INT8 and residual:
        scales["residual_scale"] = 0.1
    tile = replace(SMALL, split_k=split_k)
    sums = torch.int32 if dtype == INT8 else torch.float32
    results = []
    for sms in (2, 10_000):
        out = poisoned((shape.n, shape.p, shape.q, shape.k), dtype, device)
        launches = conv2d_tma_launches(
            x,
            weight,
            None,
            added,
            out,
            shape=shape,
            target=Target(90, sms),
            activation="relu",
            tile=tile,
            workspace=torch.empty(workspace_bytes(shape, tile) // 4, dtype=sums, device=device),
            **scales,
        )
        assert launches[0].constants["FLATTEN"] is (sms == 2)
        for launch in launches:
            launch.run()
        results.append(out.cpu())
    assert torch.equal(*results) and results[0].count_nonzero() > 0


# ---------------------------------------------------------------- machine code


def loops(ptx: str) -> list[int]:
    """How deep each loop lies within others, as the compiler notes beside its label."""
    return [int(depth) for depth in re.findall(r"Loop Header: Depth=(\d+)", ptx)]


def transfers(ptx: str) -> list[str]:
    """What the copy engine is asked for from the first loop on, in order."""
    code = ptx[ptx.index("Loop Header") :]
    ways = re.findall(r"cp\.async\.bulk\.tensor\.\dd\.(global|shared)", code)
    return ["store" if way == "global" else "load" for way in ways]


def case(name: str, dtype: torch.dtype = HALF, sm: int = 90):
    return next(boxes_cases(name, BOXES[name], 256, dtype, sm)).launch


FORMS = ("layer3.1.conv2", "layer2.0.conv2", "layer3.1.conv1", "layer3.1.conv3")


@pytest.mark.compile
@pytest.mark.parametrize("sm", [90, 100, 120])
@pytest.mark.parametrize("name", FORMS)
def test_boxes_of_the_next_tile_come_before_this_one_is_stored(name, sm):
    """A 3x3, one of stride 2, a 1x1, and one with a residual."""
    launch = case(name, sm=sm)
    if sm == 90:
        assert launch.constants["FLATTEN"]
    launch = replace(launch, constants={**launch.constants, "FLATTEN": True})
    kernel = compile_kernel(launch, sm)
    facts = facts_of(kernel)
    assert fits(facts, sm) and (sm == 120 or facts.spill_stores == 0)
    assert loops(kernel.asm["ptx"]) == [1]
    found = transfers(kernel.asm["ptx"])
    residual = launch.arguments["residual"] is not None
    assert found.index("store") == 2 + residual, "both operands, and a residual, come first"
    nested = replace(launch, constants={**launch.constants, "FLATTEN": False})
    assert loops(compile_kernel(nested, sm).asm["ptx"]) == [1, 2]


@pytest.mark.compile
def test_a_projection_keeps_its_loops():
    launch = case("layer3.0.conv3+downsample")
    assert not launch.constants["FLATTEN"]
    asked = replace(launch, constants={**launch.constants, "FLATTEN": True})
    assert loops(compile_kernel(asked, 90).asm["ptx"]) == [1, 2, 2], "no loop less for asking"


@pytest.mark.compile
def test_most_of_a_large_batch_is_flattened_in_8_bits_too():
    launches = [
        one.launch
        for one in byte_cases(90)
        if ".boxes-b256" in one.name and "downsample" not in one.name
    ]
    flat = [launch for launch in launches if launch.constants["FLATTEN"]]
    assert 2 * len(flat) > len(launches)
    for launch in flat[::4]:
        facts = facts_of(compile_kernel(launch, 90))
        assert fits(facts, 90) and facts.spill_stores == 0
