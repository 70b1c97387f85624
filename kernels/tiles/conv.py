"""Tiles of a convolution over pointers: which are valid, and which to take.

A convolution is the matrix product [M, K] x [K, N] with M = N*P*Q output pixels, N output channels
of a group and K = R*S*C taps times input channels of the group. The choice is a pure function of
shape, dtype and target: no tuning state, the same answer everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastres.kernels.cost import Target, Work
from fastres.kernels.geometry import GemmShape
from fastres.kernels.tiles.depth import MOST_STAGES, least_depth

_THREADS_PER_SM = 1536  # the smallest among sm_86 and newer; sm_80, 90 and 100 hold 2048
_TILE_OVERHEAD = 1.5e-6  # seconds to fill the pipeline and to drain the epilogue of one block


@dataclass(frozen=True)
class ConvTile:
    """How one block of the implicit GEMM is cut.

    Args:
        block_m: output pixels a block.
        block_n: output channels a block.
        block_k: depth a step of the K-loop.
        num_warps: warps of 32 threads.
        num_stages: depth of the software pipeline.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        blocks = (self.block_m, self.block_n, self.block_k)
        if any(block < 16 or block & (block - 1) for block in blocks):
            raise ValueError(f"blocks are {blocks}, expected powers of two of at least 16")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps is {self.num_warps}, expected 1, 2, 4, 8 or 16")
        if not 1 <= self.num_stages <= MOST_STAGES:
            raise ValueError(f"num_stages is {self.num_stages}, expected 1 to {MOST_STAGES}")

    def __str__(self) -> str:
        blocks = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{blocks} w{self.num_warps} s{self.num_stages}"

    def shared_bytes(self, itemsize: int) -> int:
        """Upper bound of the shared memory: the operands of every stage, or the staged result."""
        operands = self.num_stages * (self.block_m + self.block_n) * self.block_k * itemsize
        return max(operands, self.block_m * self.block_n * 4)

    def accumulators(self) -> int:
        """fp32 registers a thread holds for the result."""
        return self.block_m * self.block_n // (32 * self.num_warps)

    def stays_in_tap(self, channels: int) -> bool:
        """Whether each depth block lies within one filter tap, which makes its loads contiguous."""
        return channels % self.block_k == 0

    def programs(self, shape: GemmShape) -> int:
        """Blocks in the grid."""
        return _cdiv(shape.m, self.block_m) * _cdiv(shape.n, self.block_n) * shape.groups


def is_valid(tile: ConvTile, itemsize: int, tensor_cores: bool, target: Target) -> bool:
    """Whether the tile fits the target and reaches the instructions meant for it.

    Args:
        itemsize: bytes of an operand's element.
        tensor_cores: whether the product runs on tensor cores (fp32 in full precision does not).
    """
    if tile.shared_bytes(itemsize) > target.shared_bytes:
        return False
    if tile.block_k < least_depth(itemsize):
        return False
    if not tensor_cores:  # plain multiply-adds hold the operands in registers as well
        # at 32x64 ptxas settles for 96 registers and spills a residual; at 128x64 for 128, and with
        # Triton 3.8 spills 4 bytes on sm_90
        blocks = (tile.block_m, tile.block_n)
        return tile.accumulators() <= 32 and blocks not in ((32, 64), (128, 64))
    if 90 <= target.sm < 120 and (tile.block_m < 64 or tile.num_warps < 4):
        return False  # four warps take 64 rows together; less falls back to sm_80's HMMA
    # older matrix instructions take their operands from registers: with four warps, 64 results a
    # thread and a residual spilled on sm_86; Triton may take them for int8 on sm_100 as well
    operands_in_shared_memory = 90 <= target.sm < (120 if itemsize > 1 else 100)
    wide = operands_in_shared_memory or tile.num_warps >= 8
    return tile.accumulators() <= (64 if wide else 32)


# ---------------------------------------------------------------- the choice

_BLOCKS = (  # block_m, block_n, num_warps
    (128, 128, 8),
    (128, 64, 4),
    (128, 64, 8),
    (128, 32, 4),
    (64, 128, 4),
    (64, 64, 4),
    (64, 32, 4),
    (64, 16, 4),
    (32, 64, 4),
    (32, 32, 4),
    (16, 64, 4),
    (16, 32, 4),
)
_STAGES = (4, 3)


def choose_conv_tile(
    shape: GemmShape, itemsize: int, target: Target, *, tensor_cores: bool = True
) -> ConvTile:
    """The valid tile of least estimated time; ties go to the earlier candidate.

    Args:
        shape: the matrix product.
        itemsize: bytes of an operand's element.
        target: the GPU.
        tensor_cores: False for fp32 in full precision.
    """
    valid = conv_candidates(shape, itemsize, target, tensor_cores=tensor_cores)
    return min(valid, key=lambda tile: conv_seconds(tile, shape, itemsize, target, tensor_cores))


def conv_candidates(
    shape: GemmShape, itemsize: int, target: Target, *, tensor_cores: bool = True
) -> list[ConvTile]:
    """The valid tiles; see `choose_conv_tile`."""
    block_k = _depth(shape.channels, itemsize)
    tiles = [
        ConvTile(block_m, block_n, block_k, num_warps, num_stages)
        for block_m, block_n, num_warps in _BLOCKS
        for num_stages in _STAGES
    ]
    return [
        tile
        for tile in tiles
        if is_valid(tile, itemsize, tensor_cores, target)
        # without tensor cores, a filter tap computed for each element takes registers too
        and (tensor_cores or tile.stays_in_tap(shape.channels) or tile.accumulators() <= 16)
    ]


def _depth(channels: int, itemsize: int) -> int:
    """The depth block: up to a cache line of a pixel's channels, within one tap if it can be."""
    blocks = [
        block
        for block in (128, 64, 32, 16)
        if block * itemsize <= 128 and block >= least_depth(itemsize)
    ]
    return next((block for block in blocks if channels % block == 0), 32)


def conv_work(tile: ConvTile, shape: GemmShape, itemsize: int, *, residual: bool = False) -> Work:
    """What the blocks of one call multiply, load and store.

    Blocks count in full: what they mask is not in L2, but takes as long to be left out.

    Args:
        residual: whether a tensor of the result's size is read.
    """
    blocks = tile.programs(shape)
    depth = _cdiv(shape.k, tile.block_k) * tile.block_k
    weights = shape.groups * shape.n * shape.k
    results = shape.groups * shape.m * shape.n * (2 if residual else 1)
    loads = blocks * (tile.block_m + tile.block_n) * depth
    x = shape.groups * shape.m * shape.channels if shape.x is None else shape.x
    return Work(
        flops=2 * blocks * tile.block_m * tile.block_n * depth,
        bytes=itemsize * (x + weights + results),
        l2=itemsize * (loads + results),
    )


def conv_seconds(
    tile: ConvTile,
    shape: GemmShape,
    itemsize: int,
    target: Target,
    tensor_cores: bool,
    *,
    residual: bool = False,
) -> float:
    """Estimated time: max(device memory, rounds of blocks * max(arithmetic, L2)) + draining.

    It ranks tiles, and pointers against other forms; it predicts no times.

    Args:
        residual: see `conv_work`.
    """
    work = conv_work(tile, shape, itemsize, residual=residual)
    return blocks_seconds(work, tile, tile.programs(shape), itemsize, target, tensor_cores)


def blocks_seconds(
    work: Work,
    tile: ConvTile,
    blocks: int,
    itemsize: int,
    target: Target,
    tensor_cores: bool,
) -> float:
    """The estimate of `conv_seconds` for work in blocks, each of which is a tile's product."""
    resident = max(
        1,
        min(
            target.shared_bytes // tile.shared_bytes(itemsize),
            _THREADS_PER_SM // (32 * tile.num_warps),
            65_536 // (32 * tile.num_warps * (tile.accumulators() + 64)),
        ),
    )
    busiest = _cdiv(blocks, target.sm_count) * target.sm_count / max(1, blocks)
    drains = _cdiv(blocks, target.sm_count * resident)
    arithmetic = work.arithmetic_seconds(target, itemsize, tensor_cores)
    on_chip = busiest * max(arithmetic, work.l2_seconds(target))
    return max(work.memory_seconds(target), on_chip) + drains * _TILE_OVERHEAD


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
