"""What is asked of a kernel, without names: sizes, precision, epilogue. It has tiles and a time.

A problem is the key under which measurements are kept, and what tuning measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fastres.backends.triton.planning.eight_bits import OPERAND_OF
from fastres.backends.triton.planning.vendor import VendorTile, vendor_cost
from fastres.kernels import folding
from fastres.kernels.cost import Target, Work
from fastres.kernels.geometry import ConvShape, GemmShape, PoolShape, max_pool_cost
from fastres.kernels.tiles import (
    BoxTile,
    ChainTile,
    ConvTile,
    PoolTile,
    StemPoolTile,
    box_choice,
    boxes,
    chain,
    choose_pool_tile,
    conv,
    stem_pool,
)
from fastres.kernels.tiles.boxes import Projection
from fastres.kernels.tiles.chain import ChainShape
from fastres.options import Precision

Kind = Literal["pointers", "folded stem", "boxes", "chain", "stem and pool", "max pool", "vendor"]
AnyTile = ConvTile | BoxTile | ChainTile | StemPoolTile | PoolTile | VendorTile
TILE_OF: dict[Kind, type[AnyTile]] = {
    "pointers": ConvTile,
    "folded stem": ConvTile,
    "boxes": BoxTile,
    "chain": ChainTile,
    "stem and pool": StemPoolTile,
    "max pool": PoolTile,
    "vendor": VendorTile,
}


@dataclass(frozen=True)
class Problem:
    """A convolution through pointers or boxes or by the vendor, a chain, a stem with or without its
    max pool, or a max pool.

    Args:
        kind: which kernel.
        shape: a ChainShape for a chain, a PoolShape for a pool, else a ConvShape; `stem_shape` of
            both kinds of stem.
        projection: of boxes: the 1x1 merged into the same accumulator.
        residual: of a convolution that is no stem: whether a tensor is added in the epilogue.
        floating: of boxes in 8 bits: whether the result, or what is added, is in fp16.
        merged: of pointers: groups within each of the shape's, as `conv2d_launch` has them.
        library: of the vendor's: what runs it (`vendor.library`).
    """

    kind: Kind
    shape: ConvShape | ChainShape | PoolShape
    precision: Precision
    projection: Projection | None = None
    residual: bool = False
    floating: bool = False
    merged: int = 1
    library: str = ""

    @cached_property
    def key(self) -> str:
        """A line of text, equal for equal problems, that a person can read."""
        fields = {**vars(self.shape)}
        text = " ".join(f"{name}={_text(value)}" for name, value in fields.items())
        more = ""
        if self.projection is not None:
            more += f" projected={self.projection.channels}/{_text(self.projection.stride)}"
        if self.residual:
            more += " residual"
        if self.floating:
            more += " floating"
        if self.merged > 1:
            more += f" merged={self.merged}"
        if self.library:
            more += f" by {self.library}"
        return f"{self.kind} {self.precision} {text}{more}"

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return OPERAND_OF[self.precision].itemsize

    def candidates(self, target: Target) -> list[AnyTile]:
        """The tiles that can run it there, the best by estimate first."""
        found: list[AnyTile]
        if isinstance(self.shape, ChainShape):
            found = [*chain.chain_candidates(self.shape, self.itemsize, target)]
        elif isinstance(self.shape, PoolShape):
            found = [choose_pool_tile(self.shape.c, self.itemsize)]
        elif self.kind == "vendor":
            found = [VendorTile(self.library)]
        elif self.kind == "stem and pool":
            found = [*stem_pool.stem_pool_candidates(self.shape, self.itemsize, target)]
        elif self.kind == "boxes":
            found = [
                *box_choice.box_candidates(
                    self.shape,
                    self.itemsize,
                    target,
                    self.projection,
                    self._result_itemsize,
                    fp8=self.precision == "fp8",
                    residual=self.residual,
                )
            ]
        else:
            found = [
                *conv.conv_candidates(
                    self._gemm, self.itemsize, target, tensor_cores=self.tensor_cores
                )
            ]
        return sorted(found, key=lambda tile: self.seconds(tile, target))

    def seconds(self, tile: AnyTile, target: Target) -> float:
        """The estimate by which tiles and forms are ranked; infinite of the vendor's, unknown."""
        if isinstance(tile, VendorTile):
            return math.inf
        if isinstance(tile, ChainTile) and isinstance(self.shape, ChainShape):
            return chain.chain_seconds(tile, self.shape, self.itemsize, target)
        if isinstance(self.shape, PoolShape):
            work = self.work(tile)
            return max(work.memory_seconds(target), work.l2_seconds(target))
        assert isinstance(self.shape, ConvShape)
        if isinstance(tile, BoxTile):
            return box_choice.box_seconds(
                tile,
                self.shape,
                self.itemsize,
                target,
                self.projection,
                residual=self.residual,
                result_itemsize=self._result_itemsize,
            )
        if isinstance(tile, StemPoolTile):
            return stem_pool.stem_pool_seconds(tile, self.shape, self.itemsize, target)
        assert isinstance(tile, ConvTile)
        sizes = self._gemm, self.itemsize, target, self.tensor_cores
        return conv.conv_seconds(tile, *sizes, residual=self.residual)

    def work(self, tile: AnyTile) -> Work:
        """What a tile has the GPU do: products, device memory, L2, launches."""
        if isinstance(tile, ChainTile) and isinstance(self.shape, ChainShape):
            return chain.chain_work(tile, self.shape, self.itemsize)
        if isinstance(self.shape, PoolShape):
            cost = max_pool_cost(self.shape, self.itemsize)
            return Work(0, cost.bytes, cost.bytes)  # a block's windows overlap in its L1
        assert isinstance(self.shape, ConvShape)
        if isinstance(tile, VendorTile):
            cost = vendor_cost(self.shape, self.itemsize, residual=self.residual)
            return Work(cost.flops, cost.bytes, cost.bytes)  # what it loads from L2 is not known
        if isinstance(tile, BoxTile):
            return box_choice.box_work(
                tile,
                self.shape,
                self.itemsize,
                self.projection,
                residual=self.residual,
                result_itemsize=self._result_itemsize,
            )
        if isinstance(tile, StemPoolTile):
            return stem_pool.stem_pool_work(tile, self.shape, self.itemsize)
        assert isinstance(tile, ConvTile)
        return conv.conv_work(tile, self._gemm, self.itemsize, residual=self.residual)

    def takes(self, tile: AnyTile, target: Target) -> bool:
        """Whether a tile, perhaps from a file, can run it there."""
        if not isinstance(tile, TILE_OF[self.kind]):
            return False
        if isinstance(tile, VendorTile):
            return tile.library == self.library
        if isinstance(tile, ChainTile) and isinstance(self.shape, ChainShape):
            return chain.is_valid(tile, self.shape, self.itemsize, target)
        if isinstance(self.shape, PoolShape):
            return tile == choose_pool_tile(self.shape.c, self.itemsize)
        assert isinstance(self.shape, ConvShape)
        if isinstance(tile, BoxTile):
            return not boxes.tile_refusal(
                tile,
                self.shape,
                self.itemsize,
                target,
                self.projection,
                self._result_itemsize,
                fp8=self.precision == "fp8",
            )
        if isinstance(tile, StemPoolTile):
            return stem_pool.is_valid(tile, self.itemsize, target)
        assert isinstance(tile, ConvTile)
        return conv.is_valid(tile, self.itemsize, self.tensor_cores, target)

    @property
    def tensor_cores(self) -> bool:
        """Whether products run on them: fp32 in full precision does not."""
        return self.precision != "fp32"

    @property
    def _result_itemsize(self) -> int | None:
        return 2 if self.floating else None

    @property
    def _gemm(self) -> GemmShape:
        assert isinstance(self.shape, ConvShape)
        return folding.stem_gemm(self.shape) if self.kind == "folded stem" else self.shape.gemm


def _text(value: object) -> str:
    return "x".join(str(v) for v in value) if isinstance(value, tuple) else str(value)
