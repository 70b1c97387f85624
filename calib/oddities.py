"""Images that are unlike the rest of the calibration data: notes for who chose them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

FAR = 4.0  # times the median image's: two of int8's seven bits
_SHOWN = 3
_PICTURE = 255


class Oddities:
    """Looks at the inputs of a network, batch by batch."""

    def __init__(self) -> None:
        self._images = 0
        self._blank: list[int] = []
        self._low, self._high = 0.0, 0.0

    def add(self, x: torch.Tensor) -> None:
        """Takes in a batch, [N, ...] and not empty."""
        rows = x.reshape(len(x), -1)
        low, high = rows.amin(1), rows.amax(1)
        self._blank += [self._images + i for i in (low == high).nonzero().flatten().tolist()]
        self._low, self._high = min(self._low, float(low.min())), max(self._high, float(high.max()))
        self._images += len(x)

    def notes(
        self, largest: Mapping[str, torch.Tensor], called: Callable[[int], str]
    ) -> tuple[str, ...]:
        """
        Args:
            largest: of every tensor of the network, each image's largest magnitude.
            called: what an image is called, by its number from 0.
        """
        notes = []
        far = far_from_the_rest(largest)
        if far:
            some = ", ".join(f"{called(i)} ({times:.3g} times)" for i, times in far[:_SHOWN])
            notes.append(
                f"{some}{_more(len(far))} {'is' if len(far) == 1 else 'are'} far from the rest: "
                "values so many times as large as the median image's stretch the thresholds. Take "
                "such images out, or prepare them as the others"
            )
        if self._blank and len(self._blank) < self._images:
            some = ", ".join(called(i) for i in self._blank[:_SHOWN])
            are = "is blank: all its" if len(self._blank) == 1 else "are blank: all their"
            notes.append(f"{some}{_more(len(self._blank))} {are} values are the same")
        if self._low >= 0 and _PICTURE / 2 < self._high <= _PICTURE:
            notes.append(
                f"inputs go up to {self._high:.4g} and never below 0: if the model was trained on "
                "normalised pictures, give those"
            )
        return tuple(notes)


def far_from_the_rest(largest: Mapping[str, torch.Tensor]) -> list[tuple[int, float]]:
    """The images whose values are far larger than the others', and how many times; worst first.

    An image's distance is the median over tensors of its largest magnitude over that of the median
    image, so neither one odd tensor nor a few odd images move it. Two images are no rest.
    """
    every = torch.stack([values.double() for values in largest.values()], 1)  # [images, tensors]
    usual = every.median(0).values
    every, usual = every[:, usual > 0], usual[usual > 0]
    if len(every) < 3 or not len(usual):
        return []
    times = (every / usual).median(1).values.tolist()
    return sorted(((i, t) for i, t in enumerate(times) if t > FAR), key=lambda pair: -pair[1])


def _more(count: int) -> str:
    return f" and {count - _SHOWN} more" if count > _SHOWN else ""
