"""Which tile of boxes to take, and what it has the GPU do: a pure function of sizes and target.

As in `conv.py`: of the valid candidates that of least estimated time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from fastres.kernels.cost import Target, Work
from fastres.kernels.geometry import ConvShape
from fastres.kernels.tiles.boxes import (
    BoxTile,
    Projection,
    counter_bytes,
    input_channels,
    tile_refusal,
    walk_shape,
    workspace_bytes,
)
from fastres.kernels.tiles.depth import least_depth

_LATENCY = 0.8e-6  # seconds from asking for a box to having it; a guess, as the two below
_TILE_OVERHEAD = 1.35e-6  # seconds to fill the pipeline of one tile and to start its epilogue
_SECOND_KERNEL = 2.0e-6  # seconds that the kernel which sums the parts of a split adds by itself
_ARRIVAL = 1.0e-6  # seconds from having the last part of a sum to reading the first; a guess
_ALONE = 2.0  # what an SM loads while few others do, in shares of L2's rate; a guess
_REGISTERS = 65_536  # of one SM, 32 bits each
_RESERVED = 1024  # bytes of shared memory the driver takes from each block

_BLOCKS = (  # pixels, block_n, num_warps
    (256, 128, 8),
    (128, 256, 8),
    (128, 128, 8),
    (128, 128, 4),
    (256, 64, 8),
    (256, 64, 4),
    (64, 256, 8),
    (128, 64, 4),
    (64, 128, 4),
    (64, 64, 4),
    (32, 128, 4),
    (32, 64, 4),
    (16, 64, 4),
)
_STAGES = (4, 3, 6, 2, 1)
_SPLITS = (1, 2, 3, 4, 6, 8, 9, 12, 16)


def box_candidates(
    shape: ConvShape,
    itemsize: int,
    target: Target,
    projection: Projection | None = None,
    result_itemsize: int | None = None,
    fp8: bool = False,
    residual: bool = False,
) -> list[BoxTile]:
    """The valid tiles, for each number of pixels the box of least waste.

    Args:
        result_itemsize: see `BoxTile.shared_bytes`.
        fp8: see `tile_refusal`.
        residual: whether a residual is read.

    Raises:
        ValueError: channels which no step of the K-loop divides.
    """
    block_k = _depth(input_channels(shape, projection), itemsize)
    walk = walk_shape(shape, projection)
    tiles = (
        BoxTile(
            *_best_box(pixels, walk),
            block_n,
            block_k,
            num_warps,
            num_stages,
            split_k,
            last_adds=last_adds,
        )
        for pixels, block_n, num_warps in _BLOCKS
        for num_stages in _STAGES
        for split_k in _SPLITS
        for last_adds in ((False, True) if split_k > 1 else (False,))
    )
    valid = (
        replace(tile, programs_per_sm=_resident(tile, shape, itemsize, target, projection, fp8))
        for tile in tiles
        if tile_refusal(tile, shape, itemsize, target, projection, result_itemsize, fp8) is None
    )

    def steps(tile: BoxTile) -> int:
        """Of the longest loop."""
        flat = tile.flattens(
            walk, target, itemsize, projection, residual=residual, result_itemsize=result_itemsize
        )
        turns = tile.turns(walk, target) if flat else 1
        return turns * max(tile.steps(shape, projection)) // tile.split_k

    return [tile for tile in valid if _fills(tile, steps(tile))]


def _fills(tile: BoxTile, steps: int) -> bool:
    """Whether a pipeline has as many stages as a loop of so many steps can use, and no more."""
    return min(2, steps) <= tile.num_stages <= steps


def choose_box_tile(
    shape: ConvShape,
    itemsize: int,
    target: Target,
    projection: Projection | None = None,
    result_itemsize: int | None = None,
    fp8: bool = False,
    residual: bool = False,
) -> BoxTile:
    """The candidate of least `box_seconds`; ties go to the earlier one.

    Args:
        result_itemsize, fp8, residual: see `box_candidates`.

    Raises:
        ValueError: channels which no step of the K-loop divides.
    """
    return min(
        box_candidates(shape, itemsize, target, projection, result_itemsize, fp8, residual),
        key=lambda tile: box_seconds(
            tile,
            shape,
            itemsize,
            target,
            projection,
            residual=residual,
            result_itemsize=result_itemsize,
        ),
    )


def box_work(
    tile: BoxTile,
    shape: ConvShape,
    itemsize: int,
    projection: Projection | None = None,
    *,
    residual: bool = False,
    result_itemsize: int | None = None,
) -> Work:
    """What the tiles of one call multiply, load and store, parts of a split depth included.

    Boxes count in full: what lies outside is not in L2, but takes as long to be filled with zeros.

    Args:
        residual: whether a residual is read.
        result_itemsize: see `BoxTile.shared_bytes`.
    """
    walk = walk_shape(shape, projection)
    steps = tile.tiles(walk) * _part(tile, shape, projection)
    depth = sum(tile.steps(shape, projection)) * tile.block_k
    m = shape.n * shape.p * shape.q
    results = m * shape.k * (2 if residual else 1) * (result_itemsize or itemsize)
    x = walk.n * walk.h * walk.w * shape.c + (m * projection.channels if projection else 0)
    return Work(
        # a matrix instruction of fewer than 64 pixels takes as long as one of 64
        flops=2 * steps * max(64, tile.pixels) * tile.block_n * tile.block_k,
        bytes=itemsize * (x + shape.k * depth) + results,
        l2=steps * tile.stage_bytes(itemsize)
        + results
        + 2 * workspace_bytes(shape, tile, projection),  # written once and read once
        launches=2 if tile.split_k > 1 and not tile.last_adds else 1,
    )


def box_seconds(
    tile: BoxTile,
    shape: ConvShape,
    itemsize: int,
    target: Target,
    projection: Projection | None = None,
    *,
    residual: bool = False,
    result_itemsize: int | None = None,
) -> float:
    """Estimated time: max(device memory, tiles of the busiest SM) + draining + summing the parts.

    A tile takes the longest of its arithmetic, its traffic to and from L2, and the latency of its
    steps, of which as many overlap as there are stages. In one loop over tiles and steps only the
    first tile's boxes are waited for (`BoxTile.flattens`). It ranks tiles, and this form of a
    convolution against others; it predicts no times.

    Args:
        residual, result_itemsize: see `box_work`.
    """
    work = box_work(
        tile, shape, itemsize, projection, residual=residual, result_itemsize=result_itemsize
    )
    walk = walk_shape(shape, projection)
    every, turns = tile.tiles(walk), tile.turns(walk, target)
    part = _part(tile, shape, projection)
    tiles = _cdiv(every, target.sm_count)  # of the busiest SM
    busiest = tiles * target.sm_count / max(1, every)
    resident = min(tile.programs_per_sm, max(1, tiles))

    flat = tile.flattens(
        walk, target, itemsize, projection, residual=residual, result_itemsize=result_itemsize
    )
    in_one = turns if flat else 1
    ahead = max(1, min(tile.num_stages - 1, part * in_one))  # one stage is being multiplied
    latency = part * _LATENCY / (ahead * resident)
    drains = turns * _TILE_OVERHEAD - (in_one - 1) * _LATENCY  # others resident go on meanwhile
    moved = busiest * max(work.arithmetic_seconds(target, itemsize), work.l2_seconds(target))
    seconds = max(work.memory_seconds(target), moved, tiles * latency) + drains
    return seconds + _adding_seconds(tile, shape, target, projection)


def _adding_seconds(
    tile: BoxTile, shape: ConvShape, target: Target, projection: Projection | None
) -> float:
    """From the last part of a split depth to the sum: a second kernel's, or one SM's, which loads
    all parts of a tile by itself."""
    if tile.split_k == 1:
        return 0.0
    if not tile.last_adds:
        return _SECOND_KERNEL
    sums = _cdiv(counter_bytes(shape, tile, projection) // 4, target.sm_count)  # of the busiest SM
    loaded = sums * tile.split_k * tile.result_bytes(4)
    return _ARRIVAL + loaded / (_ALONE * target.l2_bytes)


def _part(tile: BoxTile, shape: ConvShape, projection: Projection | None) -> int:
    """Steps of the K-loop of one tile: of one part of a split depth."""
    return sum(steps // tile.split_k for steps in tile.steps(shape, projection))


def _depth(channels: list[int], itemsize: int) -> int:
    """The depth block: the most of 128 bytes, the copy engine's widest row, that divides all."""
    least = least_depth(itemsize)
    for block in (128, 64, 32, 16):
        whole = all(c % block == 0 for c in channels)
        if block * itemsize <= 128 and block >= least and whole:
            return block
    raise ValueError(f"{channels} input channels, expected multiples of {least}")


@cache
def _best_box(pixels: int, walk: ConvShape) -> tuple[int, int, int]:
    """The box of least waste; then of least input, then nearest to a row."""
    sides = [1 << i for i in range(pixels.bit_length())]
    boxes = [(pixels // (th * tw), th, tw) for th in sides for tw in sides if th * tw <= pixels]

    def waste(box: tuple[int, int, int]) -> tuple[int, ...]:
        tn, th, tw = box
        boxes = _cdiv(walk.n, tn) * _cdiv(walk.p, th) * _cdiv(walk.q, tw)
        return boxes, tn * (th + walk.r - 1) * (tw + walk.s - 1), tn, th

    return min(boxes, key=waste)


def _resident(
    tile: BoxTile,
    shape: ConvShape,
    itemsize: int,
    target: Target,
    projection: Projection | None,
    fp8: bool,
) -> int:
    """Programs an SM can hold at once, by shared memory and registers; at most four."""
    shared = target.shared_bytes // (tile.shared_bytes(itemsize) + _RESERVED)
    sums = tile.accumulators(itemsize, projection)
    sums += tile.of_a_step(shape, target, projection) if fp8 else 0
    registers = _REGISTERS // (32 * tile.num_warps * (sums + 56))
    return max(1, min(4, shared, registers))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
