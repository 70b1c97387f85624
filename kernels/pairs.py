"""Two channels of 8 bits as one number of 16: in which order the rows of weights lie for it.

Of each 16 rows of a product [channels, pixels] a thread holds r and r + 8 (PTX ISA, accumulators of
`wgmma` and `mma`): of channels in order never two that lie side by side in memory, and so a kernel
would move single bytes. With the weights' rows interleaved those two are neighbours, and what turns
a tile of 16-bit numbers on its way to shared memory and back will do. `jit/pairs.py` is the rest.
"""

from collections.abc import Sequence

import torch

_ROWS = 16


def interleaved(weight: torch.Tensor) -> torch.Tensor:
    """Of 8 bits rows 0, 2, ..., 14, 1, 3, ..., 15 of each 16; others as they are.

    So row r is channel 2r, and row r + 8 is channel 2r + 1.

    Args:
        weight: [K, ...].

    Raises:
        ValueError: K is no multiple of 16.
    """
    if weight.element_size() > 1:
        return weight
    if len(weight) % _ROWS:
        raise ValueError(f"weight has {len(weight)} rows of 8 bits, expected a multiple of {_ROWS}")
    return weight.unflatten(0, (-1, _ROWS // 2, 2)).transpose(1, 2).flatten(0, 2)


def in_pairs(x: torch.Tensor, box: Sequence[int]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A tensor of 8 bits, and a box of it, seen as 16 bits each; others as they are.

    Args:
        x: [..., C], packed, with C even.
        box: sizes of a box, that of the channels last.
    """
    if x.element_size() > 1:
        return x, tuple(box)
    return x.view(torch.int16), (*box[:-1], box[-1] // 2)
