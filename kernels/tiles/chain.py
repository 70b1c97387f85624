"""Sizes of a chained bottleneck boundary, its tiles, and whether chaining is possible and pays.

The chain is: b = 3x3 of a; out = 1x1 of b plus the shortcut; a_next = the next block's first 1x1
of out. One block of the grid makes a box of output pixels with all their channels, so nothing is
computed twice. A pure function of shape, element size and target.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastres.kernels.cost import Cost, Target, Work
from fastres.kernels.geometry import GemmShape
from fastres.kernels.tiles.depth import MOST_STAGES

WIDTHS = (64, 128)  # of the 3x3; wider ones wait for arithmetic, and would fill shared memory
DEPTH = 64  # channels in one step of the 3x3, and the granularity of every channel count
_BARRIERS = 256  # bytes: eight a stage and loop, and what Triton keeps beside them
_THREADS_PER_SM = 2048
_TILE_OVERHEAD = 1.5e-6  # seconds to fill the pipelines and to drain the last stores of one tile


@dataclass(frozen=True)
class ChainShape:
    """Sizes of a chain: a [n, h, w, mid] gives out [n, p, q, ko] and a_next [n, p, q, next_mid].

    Args:
        mid: channels of the 3x3, in and out.
        ko: channels of the block's output.
        next_mid: channels of the next block's first 1x1; 0 where the chain ends with out.
        projected: channels of the block's input x where the shortcut is a projection of it, merged
            into the last 1x1 as further depth; 0 where the shortcut is a residual.
        stride: of the 3x3.
        shortcut_stride: of the projection. Stage heads have (stride, shortcut_stride) of (2, 2) in
            v1.5, and of (1, 2) in v1, whose first 1x1 has halved a already.

    Raises:
        ValueError: sizes that no such chain has.
    """

    n: int
    h: int
    w: int
    mid: int
    ko: int
    next_mid: int = 0
    projected: int = 0
    stride: int = 1
    shortcut_stride: int = 1

    def __post_init__(self) -> None:
        if self.stride not in (1, 2) or self.shortcut_stride not in (1, 2):
            raise ValueError(
                f"stride is {self.stride} and shortcut_stride {self.shortcut_stride}, expected "
                "each to be 1 or 2"
            )
        if not self.projected and self.shortcut_stride != 1:
            raise ValueError(
                f"shortcut_stride is {self.shortcut_stride} with a residual, expected 1: only a "
                "projection can stride"
            )
        if min(self.h, self.w, self.mid, self.ko) < 1 or min(self.next_mid, self.projected) < 0:
            raise ValueError(f"a size is zero in {self}, only the batch may be")
        if self.n * self.p * self.q >= 2**31:
            raise ValueError(f"{self.n * self.p * self.q} output pixels, expected under 2**31")

    @property
    def p(self) -> int:
        """Output height."""
        return (self.h - 1) // self.stride + 1

    @property
    def q(self) -> int:
        """Output width."""
        return (self.w - 1) // self.stride + 1

    @property
    def depth(self) -> int:
        """Multiply-adds of one output pixel, and so the weights: w2, all of w3, and w1."""
        conv3 = self.ko * (self.mid + self.projected)
        return 9 * self.mid * self.mid + conv3 + self.ko * self.next_mid

    @property
    def gemms(self) -> tuple[GemmShape, ...]:
        """The matrix products of separate kernels: 3x3, last 1x1, projection, next first 1x1."""
        m = self.n * self.p * self.q
        products = [
            GemmShape(m, self.mid, 9 * self.mid, self.mid),
            GemmShape(m, self.ko, self.mid, self.mid),
        ]
        if self.projected:
            products.append(GemmShape(m, self.ko, self.projected, self.projected))
        if self.next_mid:
            products.append(GemmShape(m, self.next_mid, self.ko, self.ko))
        return tuple(products)


def chain_cost(shape: ChainShape, itemsize: int) -> Cost:
    """FLOPs and compulsory bytes of one call; biases are left out.

    Of an x whose projection strides, every second pixel is counted; b is never in memory.
    """
    pixels = shape.n * shape.p * shape.q
    shortcut = shape.projected or shape.ko
    activations = shape.n * shape.h * shape.w * shape.mid
    activations += pixels * (shortcut + shape.ko + shape.next_mid)
    return Cost(2 * pixels * shape.depth, itemsize * (activations + shape.depth))


@dataclass(frozen=True)
class ChainTile:
    """How one block of the chain is cut.

    Args:
        box: images, rows and columns of output pixels a block.
        num_warps: warps of 32 threads.
        num_stages: depth of the 3x3's software pipeline.
        chunk_stages: depth of the pipeline over chunks of out's channels; 1 loads each when needed.
        chunk: channels of out made, stored and multiplied by w1 at a time.
    """

    box: tuple[int, int, int]
    num_warps: int
    num_stages: int
    chunk_stages: int
    chunk: int = 64

    def __post_init__(self) -> None:
        sizes = (*self.box, self.chunk)
        if any(size < 1 or size & (size - 1) for size in sizes) or max(self.box) > 256:
            raise ValueError(
                f"box is {self.box} and chunk {self.chunk}, expected powers of two, and at most "
                "256 pixels along a side of the box, which is what the copy engine takes"
            )
        if self.pixels < 16 or self.chunk < 64:
            raise ValueError(
                f"box {self.box} has {self.pixels} pixels and the chunk {self.chunk} channels, "
                "expected at least 16 and 64"
            )
        if self.num_warps not in (4, 8):
            raise ValueError(f"num_warps is {self.num_warps}, expected 4 or 8")
        stages = self.num_stages, self.chunk_stages
        if not 1 <= min(stages) <= max(stages) <= MOST_STAGES:
            raise ValueError(
                f"num_stages is {self.num_stages} and chunk_stages {self.chunk_stages}, expected "
                f"each to be at least 1, and at most {MOST_STAGES}"
            )

    def __str__(self) -> str:
        box = "x".join(str(side) for side in self.box)
        return f"{box} w{self.num_warps} s{self.num_stages}/{self.chunk_stages}"

    @property
    def pixels(self) -> int:
        """Output pixels a block."""
        return self.box[0] * self.box[1] * self.box[2]

    def shared_bytes(self, shape: ChainShape, itemsize: int) -> int:
        """Upper bound of the shared memory: the larger of the two loops', with their barriers."""
        conv2 = self.num_stages * (self.pixels + shape.mid) * DEPTH
        chunk = shape.mid + shape.projected + shape.next_mid  # columns of w3, rows of w1
        if not shape.projected:
            chunk += self.pixels  # the residual's box
        # b and x stay; a chunk of out lies there twice, as an operand and on its way out
        kept = (shape.mid + shape.projected + 2 * self.chunk) * self.pixels
        chunks = kept + self.chunk_stages * chunk * self.chunk
        staged_next = shape.next_mid * self.pixels
        vectors = 3 if itemsize == 1 else 1  # of b3, and of the scales of both sums
        biases = 4 * vectors * self.chunk_stages * self.chunk
        return itemsize * max(conv2, chunks, staged_next) + biases + _BARRIERS

    def accumulators(self, shape: ChainShape, itemsize: int = 2) -> int:
        """Registers a thread holds for results: the 3x3's, or a chunk's and a_next's.

        Of 8 bits a projection has a sum of its own.
        """
        sums = 2 if itemsize == 1 and shape.projected else 1
        channels = max(shape.mid, sums * self.chunk + shape.next_mid)
        return channels * self.pixels // (32 * self.num_warps)

    def programs(self, shape: ChainShape) -> int:
        """Blocks in the grid."""
        counts = zip((shape.n, shape.p, shape.q), self.box, strict=True)
        images, rows, columns = (-(-size // side) for size, side in counts)
        return images * rows * columns


def refusal(shape: ChainShape, itemsize: int, target: Target) -> str | None:
    """Why this boundary cannot be chained on this target, in words; None if it can.

    Args:
        itemsize: bytes of an element.
    """
    if target.sm < 90:
        return f"sm_{target.sm} has no copy engine for boxes (TMA); chaining needs sm_90 or newer"
    if itemsize > 2:
        return f"elements have {itemsize} bytes; only fp16, bf16, int8 and fp8 are chained"
    if shape.mid not in WIDTHS:
        return (
            f"the 3x3 has {shape.mid} channels; only {WIDTHS} are chained: wider ones are bound "
            "by arithmetic, and their weights and pixels fill shared memory"
        )
    for name in ("projected", "next_mid"):
        size = getattr(shape, name)
        if size and (size < DEPTH or size & (size - 1)):
            return f"{name} is {size}, expected a power of two of at least {DEPTH}"
    if shape.ko % DEPTH:
        return f"out has {shape.ko} channels, expected a multiple of {DEPTH}"
    if shape.stride == 2 and (shape.h % 2 or shape.w % 2):
        return f"a 3x3 of stride 2 reads pairs of rows and columns; {shape.h}x{shape.w} is odd"
    if not chain_candidates(shape, itemsize, target):
        return (
            f"no tile fits sm_{target.sm}'s {target.shared_bytes} bytes of shared memory and its "
            "registers"
        )
    return None


# ---------------------------------------------------------------- the choice

_TILES = (  # box, warps; ResNet's 56 and 28 pixels are multiples of the boxes' sides
    ((4, 8, 8), 8),
    ((2, 8, 8), 4),
    ((2, 8, 8), 8),
    ((8, 4, 4), 8),
    ((4, 4, 4), 4),
    ((4, 4, 4), 8),
    ((1, 8, 8), 4),
    ((2, 4, 4), 4),
    ((1, 4, 8), 4),
    ((1, 4, 4), 4),
)
_STAGES = ((3, 2), (4, 2), (2, 2), (3, 1))


def is_valid(tile: ChainTile, shape: ChainShape, itemsize: int, target: Target) -> bool:
    """Whether the tile fits the target's shared memory and leaves registers for its results."""
    fits = tile.shared_bytes(shape, itemsize) <= target.shared_bytes
    # where operands come from registers as well, two sums of int8 spilled hundreds of bytes at 128
    most = 96 if itemsize == 1 and target.sm >= 120 else 128
    few = tile.accumulators(shape, itemsize) <= most
    return fits and few and shape.ko % tile.chunk == 0


def chain_candidates(shape: ChainShape, itemsize: int, target: Target) -> list[ChainTile]:
    """The valid tiles worth trying for a shape; none where nothing fits."""
    tiles = [
        ChainTile(box, num_warps, num_stages, chunk_stages)
        for box, num_warps in _TILES
        for num_stages, chunk_stages in _STAGES
    ]
    return [tile for tile in tiles if is_valid(tile, shape, itemsize, target)]


def choose_chain_tile(shape: ChainShape, itemsize: int, target: Target) -> ChainTile:
    """The valid tile of least estimated time; ties go to the earlier candidate.

    Raises:
        ValueError: the boundary cannot be chained; the message is `refusal`'s.
    """
    reason = refusal(shape, itemsize, target)
    if reason:
        raise ValueError(reason)
    tiles = chain_candidates(shape, itemsize, target)
    return min(tiles, key=lambda tile: chain_seconds(tile, shape, itemsize, target))


def chain_work(tile: ChainTile, shape: ChainShape, itemsize: int) -> Work:
    """What the blocks of one call multiply, load and store; boxes count in full."""
    phases = _phases(tile, shape, itemsize)
    return Work(
        flops=sum(work.flops for work in phases),
        bytes=chain_cost(shape, itemsize).bytes,
        l2=sum(work.l2 for work in phases),
    )


def _phases(tile: ChainTile, shape: ChainShape, itemsize: int) -> tuple[Work, Work]:
    """The work of all blocks on the 3x3, and on the chunks of out."""
    blocks = tile.programs(shape)
    conv2 = 9 * shape.mid * shape.mid  # multiply-adds a pixel, and weights
    chunks = shape.depth - conv2
    taps = 9 * shape.mid  # loaded for a pixel: each tap anew
    rows = (shape.projected or shape.ko) + shape.ko + shape.next_mid  # loaded, and stored
    first, second = (
        Work(
            2 * blocks * tile.pixels * work, 0, itemsize * blocks * (tile.pixels * channels + work)
        )
        for work, channels in ((conv2, taps), (chunks, rows))
    )
    return first, second


def chain_seconds(tile: ChainTile, shape: ChainShape, itemsize: int, target: Target) -> float:
    """Estimated time: max(device memory, rounds * one tile's time) + filling and draining.

    A tile's time is that of its 3x3 and that of its chunks, each max(arithmetic, L2), or their sum
    where the chunks' loads are not pipelined. It ranks tiles, and chains against separate kernels;
    it has not been compared with a clock.
    """
    conv2, chunks = (
        (work.arithmetic_seconds(target, itemsize), work.l2_seconds(target))
        for work in _phases(tile, shape, itemsize)
    )
    on_chip = max(conv2) + (max(chunks) if tile.chunk_stages > 1 else sum(chunks))
    registers = 32 * tile.num_warps * (tile.accumulators(shape, itemsize) + 64)
    resident = max(
        1,
        min(
            target.shared_bytes // tile.shared_bytes(shape, itemsize),
            _THREADS_PER_SM // (32 * tile.num_warps),
            65_536 // registers,
        ),
    )
    blocks = tile.programs(shape)
    busiest = -(-blocks // target.sm_count) * target.sm_count / max(1, blocks)
    drains = -(-blocks // (target.sm_count * resident))
    memory = chain_cost(shape, itemsize).bytes / target.dram_bytes
    return max(memory, busiest * on_chip) + drains * _TILE_OVERHEAD
