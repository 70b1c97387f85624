"""Boxes of pixels for the descriptor kernels: what they take, and which tiles are valid.

The copy engine (TMA) brings a box of pixels [tn, th, tw, channels] at a time, fills with zeros
what lies outside the tensor and drops what is stored there. So a box may stick out anywhere; what
it does beyond the picture is waste. Which tile to take is in `box_choice`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastres.kernels.cost import Target
from fastres.kernels.geometry import ConvShape, Pair
from fastres.kernels.tiles.depth import MOST_STAGES, least_depth, summed_by_steps

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn)
_BARRIERS = 2048  # bytes of shared memory for barriers and alignment
_BLOCK_LIMIT = 256  # the copy engine's limit on each side of a box
_MOST_PARTS = 16  # of a depth: each takes 32 bits of workspace for every element of the output
_MOST_PROGRAMS = 32  # that an SM holds


@dataclass(frozen=True)
class Projection:
    """A second product summed into the same accumulator: the 1x1 convolution of another tensor.

    Args:
        channels: its input channels.
        stride: of the pixels it reads; its output has the size of the first product's.
    """

    channels: int
    stride: Pair = (1, 1)


@dataclass(frozen=True)
class BoxTile:
    """How one tile of the transposed product acc[channels, pixels] is cut.

    Args:
        tn, th, tw: images, rows and columns of a box of output pixels.
        block_n: output channels a tile.
        block_k: input channels a step of the K-loop; a step lies within one filter tap.
        num_warps: warps of 32 threads.
        num_stages: depth of the software pipeline.
        split_k: parts the depth is cut into, each a tile of its own.
        programs_per_sm: programs launched for each SM; together they walk over all tiles.
        last_adds: whether the parts are added by the program that stores the last of them, and not
            by a second kernel.
    """

    tn: int
    th: int
    tw: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    programs_per_sm: int = 1
    last_adds: bool = False

    def __post_init__(self) -> None:
        sides = (self.tn, self.th, self.tw, self.block_n, self.block_k)
        if any(not 1 <= side <= _BLOCK_LIMIT or side & (side - 1) for side in sides):
            raise ValueError(
                f"the box is {sides[:3]} with blocks of {sides[3:]} channels, expected powers of "
                f"two of at most {_BLOCK_LIMIT}"
            )
        if min(self.pixels, self.block_n, self.block_k) < 16:
            raise ValueError(
                f"{self.pixels} pixels, {self.block_n} and {self.block_k} channels a tile, "
                "expected at least 16 of each"
            )
        if self.num_warps not in (4, 8):
            raise ValueError(f"num_warps is {self.num_warps}, expected 4 or 8")
        numbers = self.num_stages, self.split_k, self.programs_per_sm
        limits = MOST_STAGES, _MOST_PARTS, _MOST_PROGRAMS
        if any(not 1 <= number <= most for number, most in zip(numbers, limits, strict=True)):
            raise ValueError(
                f"num_stages is {self.num_stages}, split_k {self.split_k}, programs_per_sm "
                f"{self.programs_per_sm}; expected each to be at least 1, and at most {limits}"
            )
        if self.last_adds and self.split_k == 1:
            raise ValueError("last_adds is set with split_k 1: there are no parts to add")

    def __str__(self) -> str:
        box = f"({self.tn},{self.th},{self.tw})x{self.block_n}x{self.block_k}"
        split = f" split {self.split_k}" if self.split_k > 1 else ""
        split += " last" if self.last_adds else ""
        return f"{box} w{self.num_warps} s{self.num_stages}{split} p{self.programs_per_sm}"

    @property
    def pixels(self) -> int:
        """Output pixels of a box."""
        return self.tn * self.th * self.tw

    def stage_bytes(self, itemsize: int) -> int:
        """Bytes of both operands in one step of the K-loop."""
        return (self.pixels + self.block_n) * self.block_k * itemsize

    def result_bytes(self, itemsize: int) -> int:
        """Bytes a tile stores: elements of the output, or 32 bits each of a part of it."""
        return self.pixels * self.block_n * (4 if self.split_k > 1 else itemsize)

    def shared_bytes(
        self, itemsize: int, result_itemsize: int | None = None, *, residual_apart: bool = False
    ) -> int:
        """Upper bound of the shared memory: operands of every stage, the result on its way out.

        Args:
            result_itemsize: the larger of the output's and the residual's; as operands when None.
            residual_apart: whether a residual has room of its own, as in one loop (`flattens`);
                in two it takes the place of the operands, of which none is on its way then.
        """
        operands = self.num_stages * self.stage_bytes(itemsize)
        result = self.result_bytes(result_itemsize or itemsize)
        # the result leaves while the next tile is under way
        return max(operands, result) + (2 if residual_apart else 1) * result + _BARRIERS

    def accumulators(self, itemsize: int = 2, projection: Projection | None = None) -> int:
        """Registers a thread holds for the result; of 8 bits, a projection has a second sum."""
        sums = 2 if itemsize == 1 and projection is not None else 1
        return sums * self.pixels * self.block_n // (32 * self.num_warps)

    def steps(self, shape: ConvShape, projection: Projection | None = None) -> list[int]:
        """Steps of the K-loop over each operand, all parts of the depth together."""
        taps = (shape.r * shape.s, 1)
        channels = input_channels(shape, projection)
        return [tap * c // self.block_k for tap, c in zip(taps, channels, strict=False)]

    def of_a_step(
        self, shape: ConvShape, target: Target, projection: Projection | None = None
    ) -> int:
        """Registers a thread holds besides, of fp8, where each step is summed by itself."""
        by_steps = summed_by_steps(self.depth(shape, projection), target)
        return self.accumulators() if by_steps else 0

    def depth(self, shape: ConvShape, projection: Projection | None = None) -> int:
        """Products in the deepest sum of a tile: of one operand, and of one part of a split."""
        return max(self.steps(shape, projection)) * self.block_k // self.split_k

    def boxes(self, walk: ConvShape) -> tuple[int, int, int]:
        """Boxes along images, rows and columns of the output, with `walk` from `walk_shape`."""
        return _cdiv(walk.n, self.tn), _cdiv(walk.p, self.th), _cdiv(walk.q, self.tw)

    def tiles(self, walk: ConvShape) -> int:
        """Boxes times blocks of channels times parts of the depth."""
        n, p, q = self.boxes(walk)
        return n * p * q * _cdiv(walk.k, self.block_n) * self.split_k

    def programs(self, walk: ConvShape, target: Target) -> int:
        """Programs launched: they walk over the tiles."""
        return min(self.tiles(walk), target.sm_count * self.programs_per_sm)

    def turns(self, walk: ConvShape, target: Target) -> int:
        """Tiles of the busiest program."""
        return _cdiv(self.tiles(walk), max(1, self.programs(walk, target)))

    def flattens(
        self,
        walk: ConvShape,
        target: Target,
        itemsize: int,
        projection: Projection | None = None,
        *,
        residual: bool = False,
        result_itemsize: int | None = None,
    ) -> bool:
        """Whether the loops over tiles and over their steps are one, which never runs dry.

        Then the boxes of the next tile are on their way during the epilogue. That needs a next
        tile, one product (of three loops the compiler makes no one) with the same epilogue for all
        programs, and, as operands do not make way for it, room for a residual in as many programs
        as an SM is to hold.

        Args:
            residual: whether one is read.
            result_itemsize: see `shared_bytes`.
        """
        if projection is not None or self.num_stages == 1 or self.turns(walk, target) <= 1:
            return False
        if self.last_adds:  # a branch that its last program alone takes, among the loop's steps
            return False
        if not residual or self.split_k > 1:  # a second kernel adds it then
            return True
        apart = self.shared_bytes(itemsize, result_itemsize, residual_apart=True)
        return self.programs_per_sm * apart <= target.shared_bytes


def input_channels(shape: ConvShape, projection: Projection | None) -> list[int]:
    """Of each operand."""
    return [shape.c] if projection is None else [shape.c, projection.channels]


def walk_shape(shape: ConvShape, projection: Projection | None = None) -> ConvShape:
    """The convolution as the kernel walks over it.

    A 1x1 convolution without padding reads one pixel for each output: a stride becomes strides of
    the view, and where every pixel is read, all of them are one row. Others stay as they are.
    """
    if (shape.r, shape.s, shape.padding) != (1, 1, (0, 0)):
        return shape
    every = shape.n > 0 and shape.stride == (1, 1)
    every &= projection is None or projection.stride == (1, 1)
    sizes = (1, 1, shape.n * shape.p * shape.q) if every else (shape.n, shape.p, shape.q)
    return ConvShape(*sizes, shape.c, shape.k, 1, 1)


def refusal(
    shape: ConvShape,
    dtype: torch.dtype,
    target: Target,
    projection: Projection | None = None,
    *,
    allow_tf32: bool = False,
) -> str | None:
    """Why no tile of the descriptor kernel can run this convolution; None when one can.

    A planner then falls back to the pointer kernel, which takes every convolution.
    """
    if target.sm < 90:
        return f"sm_{target.sm} has no copy engine for boxes, expected sm_90 or newer"
    if dtype == torch.float32 and not allow_tf32:
        return "fp32 in full precision does not run on tensor cores, expected allow_tf32"
    if dtype not in _DTYPES:
        return f"dtype is {dtype}, expected fp16, bf16, fp32, int8 or fp8 e4m3"
    if shape.groups != 1:
        return f"groups is {shape.groups}, expected 1"
    depth = least_depth(dtype.itemsize)
    if any(channels % depth for channels in input_channels(shape, projection)):
        channels = shape.c if projection is None else (shape.c, projection.channels)
        return f"input channels are {channels}, expected multiples of {depth}, a step of the K-loop"
    if shape.k % (aligned := 16 if dtype.itemsize == 1 else 8):
        return (
            f"output channels are {shape.k}, expected a multiple of {aligned} for aligned strides"
        )
    walk = walk_shape(shape, projection)
    if walk.stride not in ((1, 1), (2, 2)):
        return f"stride is {shape.stride}, expected (1, 1) or (2, 2)"
    if walk.stride == (2, 2) and (shape.h % 2 or shape.w % 2):
        return f"stride is 2 over {shape.h}x{shape.w} pixels, expected even numbers"
    return None


def tile_refusal(
    tile: BoxTile,
    shape: ConvShape,
    itemsize: int,
    target: Target,
    projection: Projection | None = None,
    result_itemsize: int | None = None,
    fp8: bool = False,
) -> str | None:
    """Why the tile cannot run this convolution as it is meant to; None when it can.

    Args:
        result_itemsize: see `BoxTile.shared_bytes`.
        fp8: whether it multiplies fp8, whose deep sums are held twice (`summed_by_steps`).
    """
    for channels in input_channels(shape, projection):
        if channels % tile.block_k:
            return f"a step of {tile.block_k} channels does not divide {channels}"
    for steps in tile.steps(shape, projection):
        if steps % tile.split_k:
            return f"split_k {tile.split_k} does not divide {steps} steps of the K-loop"
    if (shared := tile.shared_bytes(itemsize, result_itemsize)) > target.shared_bytes:
        return f"it needs {shared} bytes of shared memory, sm_{target.sm} has {target.shared_bytes}"
    if tile.split_k > 1 and itemsize == 1 and projection is not None:
        return (
            f"split_k is {tile.split_k}: a projection of 8 bits has a scale, and a sum, of its own"
        )
    if tile.block_k < least_depth(itemsize):
        return f"block_k is {tile.block_k}, expected at least {least_depth(itemsize)} of 8 bits"
    if (accumulators := tile.accumulators(itemsize, projection)) > 128:
        return f"{accumulators} accumulators a thread, more than 128 leave no registers"
    if fp8 and (of_a_step := tile.of_a_step(shape, target, projection)) > 64:
        return f"{of_a_step} accumulators a thread, and as many of a step, leave no registers"
    if 90 <= target.sm < 120 and tile.block_n < 64:
        return f"block_n is {tile.block_n}: below 64 rows the matrix instruction is an older one"
    return None


def workspace_bytes(shape: ConvShape, tile: BoxTile, projection: Projection | None = None) -> int:
    """Bytes of workspace `conv2d_tma` needs: 32 bits for each part of a split depth, or nothing.

    For a second kernel parts lie as the output does; where the last one adds, each in one piece.
    """
    if tile.split_k == 1:
        return 0
    if tile.last_adds:
        return 4 * tile.tiles(walk_shape(shape, projection)) * tile.pixels * tile.block_n
    return 4 * tile.split_k * shape.n * shape.p * shape.q * shape.k


def counter_bytes(shape: ConvShape, tile: BoxTile, projection: Projection | None = None) -> int:
    """Bytes of counters `conv2d_tma` needs: 32 bits for each sum whose last part adds up all."""
    if not tile.last_adds:
        return 0
    return 4 * tile.tiles(walk_shape(shape, projection)) // tile.split_k


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
