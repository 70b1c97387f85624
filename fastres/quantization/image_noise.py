"""How much of each image's outputs is left beside the noise of quantisation."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import torch

Outputs = Sequence[torch.Tensor]  # a network's, for a batch


class Exact:
    """The outputs that others are held against, image by image.

    An image's signal is what its outputs have that the median image's have not: |o - median(o)|^2,
    or |o|^2 where that is nothing, as for one image alone. With the mean instead, one odd image
    would be a part of all signals.

    Args:
        outputs: of each batch; [N, ...] each, of any shape.
        images: how many each batch has.
    """

    def __init__(self, outputs: Sequence[Outputs], images: Sequence[int]) -> None:
        self._images = images
        count = len(outputs[0])
        self._rows = [
            [_rows(batch[i], n) for batch, n in zip(outputs, images, strict=True)]
            for i in range(count)
        ]
        self._signals = [_signals(batches) for batches in self._rows]

    def median_sqnr(self, outputs: Iterable[Outputs]) -> float:
        """In dB: the median over images of the worst of an image's outputs.

        Args:
            outputs: of the same batches.
        """
        found: list[float] = []
        for number, (batch, n) in enumerate(zip(outputs, self._images, strict=True)):
            worst = torch.full((n,), torch.inf, dtype=torch.float64, device="cpu")
            for i, y in enumerate(batch):
                noise = _energy(_rows(y, n), self._rows[i][number])
                sqnr = 10 * (self._signals[i][number].log10() - noise.log10())
                worst = torch.minimum(worst, _numbers(sqnr, -torch.inf))
            found += worst.tolist()
        return statistics.median_low(found)


def _rows(y: torch.Tensor, images: int) -> torch.Tensor:
    """An output by images, [N, values] in float64; one without a batch is the same for all."""
    if y.dim() and len(y) == images:
        return y.double().reshape(images, -1)
    return y.double().reshape(1, -1).expand(images, -1)


def _signals(batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of each batch [N], by images; those of another size have a median of their own."""
    medians = {}
    for size in {rows.shape[1] for rows in batches}:
        ordered = torch.cat([rows for rows in batches if rows.shape[1] == size]).sort(0).values
        middle = len(ordered) // 2
        medians[size] = (ordered[middle] + ordered[~middle]) / 2
    found = []
    for rows in batches:
        apart = _energy(medians[rows.shape[1]].expand_as(rows), rows)
        whole = rows.masked_fill(~rows.isfinite(), 0.0).square().sum(1)
        found.append(torch.where(apart > 0, apart, whole))
    return found


def _energy(rows: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """|rows - exact|^2 of each image; what is no number in both alike counts as equal."""
    equal = (rows == exact) | (rows.isnan() & exact.isnan())
    return _numbers((rows - exact).masked_fill(equal, 0.0).square().sum(1), torch.inf)


def _numbers(values: torch.Tensor, instead: float) -> torch.Tensor:
    return values.masked_fill(values.isnan(), instead)
