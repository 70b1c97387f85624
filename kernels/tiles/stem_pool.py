"""How the pooled stem is cut into blocks, which cuts a target takes, and their estimated time."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from fastres.kernels.cost import Target, Work
from fastres.kernels.folding import FOLDED, ROW, TAPS, stem_gemm
from fastres.kernels.geometry import ConvShape, GemmShape
from fastres.kernels.tiles.conv import ConvTile, blocks_seconds, conv_work
from fastres.kernels.tiles.conv import is_valid as is_valid_product

_PIXELS = (4, 8, 16)  # rows and columns of a block, pooled
_CHANNELS = (16, 32, 64)


@dataclass(frozen=True)
class StemPoolTile:
    """How one block of the pooled stem is cut.

    Args:
        block_p, block_q: rows and columns of pooled pixels, of which all but the last are stored.
        block_k: output channels a block.
        num_warps: warps of 32 threads.
        num_stages: depth of the software pipeline.
    """

    block_p: int = 8
    block_q: int = 8
    block_k: int = 64
    num_warps: int = 8
    num_stages: int = 2  # two rows of taps are 80 KB: two blocks fit an SM of sm_80, 90 or 100

    def __post_init__(self) -> None:
        blocks = (self.block_p, self.block_q, self.block_k)
        if any(block & (block - 1) for block in blocks) or min(blocks) < 2 or self.block_k < 16:
            raise ValueError(f"blocks are {blocks}, expected powers of two of at least 2, 2 and 16")
        _ = self.product  # which refuses other numbers of warps and stages

    def __str__(self) -> str:
        blocks = f"{self.block_p}x{self.block_q}x{self.block_k}"
        return f"{blocks} w{self.num_warps} s{self.num_stages}"

    @property
    def product(self) -> ConvTile:
        """The matrix product of a block: pixels of the stem, output channels, a row of taps."""
        pixels = 4 * self.block_p * self.block_q
        return ConvTile(pixels, self.block_k, ROW, self.num_warps, self.num_stages)

    def programs(self, n: int, p: int, q: int, k: int) -> int:
        """Blocks in the grid, for p x q pixels of the stem."""
        rows = _cdiv(pooled(p), self.block_p - 1)
        columns = _cdiv(pooled(q), self.block_q - 1)
        return n * rows * columns * _cdiv(k, self.block_k)


def pooled(size: int) -> int:
    """Pixels that a 3x3 max pool of stride 2 and padding 1 makes of `size`."""
    return (size + 1) // 2


def stem_pool_refusal(p: int, q: int, itemsize: int) -> str | None:
    """Why a stem of p x q output pixels is not pooled in the same kernel; None when it is.

    For where `stem_refusal` has nothing to say; a planner then takes `stem` and `max_pool`.
    """
    if itemsize > 2:
        return f"elements have {itemsize} bytes, expected 1 or 2, for a map that fits registers"
    if (p + TAPS - 1) * (q + TAPS - 1) * FOLDED >= 2**31:
        return f"the stem has {p}x{q} pixels, expected under 2**31 elements in a folded picture"
    return None


def stem_pool_work(tile: StemPoolTile, shape: ConvShape, itemsize: int) -> Work:
    """What the blocks of one call multiply, load and store.

    Args:
        shape: `stem_shape` of the stem.
    """
    blocks = tile.programs(shape.n, shape.p, shape.q, shape.k) // _cdiv(shape.k, tile.block_k)
    computed = GemmShape(
        blocks * tile.product.block_m, shape.k, TAPS * ROW, ROW, x=stem_gemm(shape).x
    )
    work = conv_work(tile.product, computed, itemsize)
    # of the map that blocks compute only the pooled pixels are stored
    stored = shape.n * pooled(shape.p) * pooled(shape.q) - computed.m
    kept = itemsize * shape.k * stored
    return Work(work.flops, work.bytes + kept, work.l2 + kept)


def stem_pool_seconds(tile: StemPoolTile, shape: ConvShape, itemsize: int, target: Target) -> float:
    """Estimated time, by the rule of `conv_seconds`: of all the pixels that blocks compute.

    Args:
        shape: `stem_shape` of the stem.
    """
    work = stem_pool_work(tile, shape, itemsize)
    blocks = tile.programs(shape.n, shape.p, shape.q, shape.k)
    return blocks_seconds(work, tile.product, blocks, itemsize, target, tensor_cores=True)


def choose_stem_pool_tile(k: int) -> StemPoolTile:
    """8x8 pooled pixels, of which 7x7 are stored, and up to 64 channels."""
    return StemPoolTile(block_k=next((c for c in _CHANNELS if c >= k), _CHANNELS[-1]))


def stem_pool_candidates(shape: ConvShape, itemsize: int, target: Target) -> Iterator[StemPoolTile]:
    """Every tile that may be worth trying.

    Args:
        shape: `stem_shape` of the stem.
        itemsize: bytes of an element of the folded picture.
    """
    for p, q, k, warps, stages in product(_PIXELS, _PIXELS, _CHANNELS, (4, 8), (2, 3)):
        tile = StemPoolTile(p, q, k, warps, stages)
        if k < 2 * shape.k and is_valid(tile, itemsize, target):
            yield tile


def is_valid(tile: StemPoolTile, itemsize: int, target: Target) -> bool:
    """Whether a tile, perhaps from a file, fits the target."""
    return is_valid_product(tile.product, itemsize, True, target)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
