"""Operands as boxes: the descriptors by which the copy engine loads and stores."""

from collections.abc import Sequence

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.kernels.geometry import ConvShape, Pair
from fastres.kernels.tiles.boxes import BoxTile


def descriptor(name: str, view: torch.Tensor, box: Sequence[int]) -> TensorDescriptor:
    """Boxes of a tensor of which each row starts at a multiple of 16 bytes.

    Raises:
        ValueError: one does not.
    """
    if view.data_ptr() % 16:
        raise ValueError(
            f"{name} starts {view.data_ptr() % 16} bytes past a multiple of 16, expected a multiple"
        )
    strides = [stride * view.element_size() for stride in view.stride()[:-1]]
    if any(stride % 16 for stride in strides):
        raise ValueError(f"{name} has strides of {strides} bytes, expected multiples of 16")
    return TensorDescriptor.from_tensor(view, list(box))


def input_boxes(
    x: torch.Tensor, shape: ConvShape, walk: ConvShape, tile: BoxTile
) -> TensorDescriptor:
    """The input as boxes: a stride of 2 gets dimensions for the parity of rows and of columns."""
    if walk != shape:
        return pixel_boxes("x", x, shape.stride, walk, tile)
    if walk.stride == (1, 1):
        return descriptor("x", x, (tile.tn, tile.th, tile.tw, tile.block_k))
    view = x.view(shape.n, shape.h // 2, 2, shape.w // 2, 2 * shape.c)
    return descriptor("x", view, (tile.tn, tile.th, 1, tile.tw, tile.block_k))


def pixel_boxes(
    name: str, x: torch.Tensor, stride: Pair, walk: ConvShape, tile: BoxTile
) -> TensorDescriptor:
    """Boxes of the pixels that a 1x1 convolution of this stride reads, one for each output."""
    view = x[:, :: stride[0], :: stride[1]]
    if view.shape[:3] != (walk.n, walk.p, walk.q):
        view = view.view(walk.n, walk.p, walk.q, x.shape[3])
    return descriptor(name, view, (tile.tn, tile.th, tile.tw, tile.block_k))
