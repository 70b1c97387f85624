"""3x3 convolutions of stride 1 by Winograd: y = activation(conv(x) + bias + residual), in NHWC."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastres.kernels.cpu import library

TILES = (4, 2)  # m of F(m x m, 3 x 3)


@dataclass(frozen=True)
class Blocking:
    """How a convolution is cut; no number depends on it.

    Args:
        tile: m of F(m x m, 3 x 3).
        block: tiles that are transformed together.
        shared: whether threads share the outputs of one block, or have blocks of their own.
        chunk: panels of outputs that a thread takes at a time, where shared.
    """

    tile: int
    block: int
    shared: bool = False
    chunk: int = 2


class Weights:
    """Of one convolution, transformed for one tile and the instructions of this processor.

    Args:
        weight: float32 [outputs, channels, 3, 3]. It is kept: what holds NaN or infinities is
            computed from it.
        bias: float32 [outputs].

    Raises:
        ValueError: another shape or dtype, or a tile that there is no kernel for.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, tile: int, isa: int | None = None
    ) -> None:
        if weight.dim() != 4 or weight.shape[2:] != (3, 3):
            raise ValueError(f"weights of 3x3 are [K, C, 3, 3], not {list(weight.shape)}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"the bias is [{len(weight)}], not {list(bias.shape)}")
        if tile not in TILES:
            raise ValueError(f"there are tiles of {TILES}, not {tile}")
        self.tile, self.isa = tile, library.instructions() if isa is None else isa
        self.outputs, self.channels = weight.shape[:2]
        self.weight, self.bias = _whole("weight", weight), _whole("bias", bias)
        size = library.prepared_size(self.isa, tile, self.channels, self.outputs)
        self.prepared = torch.empty(size, dtype=torch.float32)
        library.prepare(
            self.isa,
            tile,
            self.channels,
            self.outputs,
            self.weight.data_ptr(),
            self.prepared.data_ptr(),
        )


def convolve(
    x: torch.Tensor,
    weights: Weights,
    y: torch.Tensor,
    blocking: Blocking,
    *,
    residual: torch.Tensor | None = None,
    relu: bool = False,
    threads: int = 1,
) -> None:
    """y[n, h, w, k] = relu(sum_crs x[n, h+r-1, w+s-1, c] weight[k, c, r, s] + bias[k] + residual).

    A result rounds by the largest value of its tile's inputs, 6x6 pixels of F(4), not of the 3x3
    alone that it reads; where that would not be finite it is computed from these. The same bits for
    any blocking and number of threads.

    Source: A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks (2015).

    Args:
        x: float32 [N, H, W, C], contiguous.
        y: float32 [N, H, W, K], contiguous; written.
        residual: as y, or None.
        threads: of the oneTBB arena that this is called in, how many may take part.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        MemoryError: there is not enough for what lies between.
    """
    images, height, width, channels = x.shape
    shape = (images, height, width, weights.outputs)
    if channels != weights.channels:
        raise ValueError(f"x has {channels} channels, the weights {weights.channels}")
    for name, tensor in (("y", y), ("residual", residual)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {list(shape)}, not {list(tensor.shape)}")
    if blocking.tile != weights.tile:
        raise ValueError(f"the weights are for tiles of {weights.tile}, not {blocking.tile}")
    if threads < 1 or blocking.block < 1 or blocking.chunk < 1:
        raise ValueError(f"{blocking} and {threads} threads: each is at least 1")
    given = library.Given(
        *(images, height, width, channels, weights.outputs),
        *(_address("x", x), channels, 16),
        *(None if residual is None else _address("residual", residual), weights.outputs, 16),
        *(_address("y", y), weights.outputs, 16),
        *(weights.weight.data_ptr(), weights.bias.data_ptr(), weights.prepared.data_ptr()),
        *(relu, weights.tile, blocking.shared, threads, blocking.block, blocking.chunk),
    )
    library.convolve(weights.isa, given)


def _whole(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(f"{name} is float32 on the CPU, not {tensor.dtype} on {tensor.device}")
    return tensor.detach().contiguous()


def _address(name: str, tensor: torch.Tensor) -> int:
    if not _whole(name, tensor).data_ptr() == tensor.data_ptr():
        raise ValueError(f"{name} is contiguous: its strides are {tensor.stride()}")
    return tensor.data_ptr()
