"""How a kernel's work is cut into tiles, and which tile to take: data, and estimates; no triton.

A file for each kind of kernel: `conv.py` for convolutions over pointers, `boxes.py` with
`box_choice.py` for those over boxes, `chain.py`, `stem_pool.py`, `pool.py`. Each `choose_*` is a
pure function of sizes, element size and target.
"""

from fastres.kernels.tiles.box_choice import choose_box_tile
from fastres.kernels.tiles.boxes import BoxTile
from fastres.kernels.tiles.chain import ChainTile, choose_chain_tile
from fastres.kernels.tiles.conv import ConvTile, choose_conv_tile
from fastres.kernels.tiles.pool import PoolTile, choose_mean_tile, choose_pool_tile
from fastres.kernels.tiles.stem_pool import StemPoolTile, choose_stem_pool_tile

__all__ = [
    "BoxTile",
    "ChainTile",
    "ConvTile",
    "PoolTile",
    "StemPoolTile",
    "choose_box_tile",
    "choose_chain_tile",
    "choose_conv_tile",
    "choose_mean_tile",
    "choose_pool_tile",
    "choose_stem_pool_tile",
]
