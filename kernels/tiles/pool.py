"""Tiles of the kernels without a matrix product: pools, means, sums, copies between layouts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolTile:
    """How one block of a pooling kernel is cut.

    Args:
        block_m: pixels a block: output pixels of a window, input pixels a step of a mean.
        block_c: channels a block.
        num_warps: warps of 32 threads.
    """

    block_m: int
    block_c: int
    num_warps: int

    def __post_init__(self) -> None:
        blocks = (self.block_m, self.block_c)
        if any(block < 1 or block & (block - 1) for block in blocks):
            raise ValueError(f"blocks are {blocks}, expected powers of two")

    def programs(self, pixels: int, channels: int) -> int:
        """Blocks in the grid."""
        return _cdiv(pixels, self.block_m) * _cdiv(channels, self.block_c)


def choose_pool_tile(channels: int, itemsize: int) -> PoolTile:
    """Four warps whose threads each load 16 bytes of one pixel's channels at a time."""
    block_c = min(_power_of_two(channels), 64)
    threads_c = max(1, block_c * itemsize // 16)
    return PoolTile(128 // threads_c, block_c, num_warps=4)


def choose_mean_tile(pixels: int, channels: int, itemsize: int) -> PoolTile:
    """As `choose_pool_tile`, with no more rows than the picture has pixels."""
    tile = choose_pool_tile(channels, itemsize)
    return PoolTile(min(tile.block_m, _power_of_two(pixels)), tile.block_c, tile.num_warps)


def _power_of_two(n: int) -> int:
    """The least power of two not below n."""
    return 1 << (n - 1).bit_length()


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
