"""How pictures become inputs, as a saved engine has it."""

from __future__ import annotations

from typing import Literal

import msgspec

from fastres.calib.images import Preprocess


class PreprocessEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`Preprocess` but for `max_pixels`, which nobody else's file may raise.

    Before there was `exif` nothing was turned, and `exif` is not written where it is so.
    """

    resize: int | None
    crop: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: float
    channels: Literal["RGB", "BGR"]
    interpolation: Literal["bilinear", "bicubic"]
    exif: bool = False

    @classmethod
    def of(cls, preprocess: Preprocess | None) -> PreprocessEntry | None:
        """What is written down of it."""
        if preprocess is None:
            return None
        fields = msgspec.structs.asdict(preprocess)
        return cls(**{name: fields[name] for name in cls.__struct_fields__})

    def opened(self) -> Preprocess:
        """
        Raises:
            ValueError: its numbers are none to preprocess by.
        """
        return Preprocess(**msgspec.structs.asdict(self))
