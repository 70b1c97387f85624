"""From image files to the tensor a network was trained on: decode, resize, crop, normalise."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
import torch
from msgspec.structs import force_setattr

from fastres.calib.decoding import MAX_PIXELS, called, decode
from fastres.calib.decoding import ImageLike as ImageLike
from fastres.wording import LINE, named

if TYPE_CHECKING:
    from PIL import Image
    from PIL.Image import Resampling

Box = tuple[int, int, int, int]  # left, top, right, bottom
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
_LARGEST = 2**16  # pixels of a side; Pillow takes no picture that is larger
_MOST_PIXELS = 2**30
_WHOLE = 2**24  # pixels up to which a picture is resized whole, and cropped then
_REACH = 2  # source pixels that a filter looks at on each side, or as many times the scale
_FILTERS = ("bilinear", "bicubic")


class Preprocess(msgspec.Struct, frozen=True):
    """What was done to an image in training, and must be done in deployment too.

    x = (image * scale - mean) / std per channel, after resizing the shorter side to `resize` and
    cropping `crop` x `crop` from the centre. Defaults and rounding are those of torchvision's
    ImageNet weights.

    Args:
        resize: pixels of the shorter side; None keeps the size.
        crop: side of the central crop; None keeps the whole image.
        mean, std: per channel, in the order of `channels`, in units of the scaled image.
        scale: 1/255 for networks fed 0 to 1, 1 for those fed 0 to 255.
        channels: "RGB" or "BGR" (Caffe, detectron2).
        interpolation: "bilinear" or "bicubic", antialiased.
        exif: whether pictures are turned as their EXIF orientation says, and so as people see them.
            torchvision does not: False gives its numbers for pictures that a camera turned. Engines
            saved before there was this choice have False.
        max_pixels: of a picture, as it comes and as it becomes; larger ones are refused before they
            are decoded. It is the caller's, and not saved with an engine.
    """

    resize: int | None = 256
    crop: int | None = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    scale: float = 1 / 255
    channels: Literal["RGB", "BGR"] = "RGB"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    exif: bool = True
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            size = getattr(self, name)
            whole = isinstance(size, int) and not isinstance(size, bool)
            if size is not None and not (whole and 1 <= size <= _LARGEST):
                raise ValueError(
                    f"{name} is {size!r}; it must be an integer of 1 to {_LARGEST}, or None"
                )
        for name in ("mean", "std"):
            found = _numbers(getattr(self, name))
            if len(found) != 3:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give three finite numbers")
            force_setattr(self, name, found)
        if any(s <= 0 for s in self.std):
            raise ValueError(f"std is {self.std}; every entry must be above 0")
        (scale,) = _numbers((self.scale,)) or (0.0,)
        if scale == 0:
            raise ValueError(f"scale is {self.scale!r}; give a finite number other than 0")
        force_setattr(self, "scale", scale)
        if self.channels not in ("RGB", "BGR") or self.interpolation not in _FILTERS:
            raise ValueError(
                f"channels={self.channels!r}, interpolation={self.interpolation!r}: supported are "
                "RGB, BGR and bilinear, bicubic"
            )

        if not isinstance(self.exif, bool):
            raise ValueError(f"exif is {self.exif!r}; give True or False")
        if type(self.max_pixels) is not int or not 1 <= self.max_pixels <= _MOST_PIXELS:
            raise ValueError(
                f"max_pixels is {self.max_pixels!r}; it must be an integer of 1 to {_MOST_PIXELS}"
            )

    def __call__(self, image: ImageLike) -> torch.Tensor:
        """One image → float32 [3, H, W].

        Raises:
            ValueError: not an image, without pixels, too large, or smaller than the crop; names it.
        """
        pixels = self.pixels(image).permute(2, 0, 1).float()
        if self.channels == "BGR":
            pixels = pixels.flip(0)
        mean, std = (pixels.new_tensor(v).reshape(3, 1, 1) for v in (self.mean, self.std))
        return ((pixels * self.scale - mean) / std).contiguous()

    def pixels(self, image: ImageLike) -> torch.Tensor:
        """One image, resized and cropped only → uint8 [H, W, 3] in RGB.

        Raises:
            ValueError: as for the whole.
        """
        picture = decode(image, exif=self.exif, max_pixels=self.max_pixels)
        return torch.from_numpy(np.array(self._resized(picture, called(image))))

    def batch(
        self, images: Sequence[ImageLike], *, normalise: bool = True, first: int = 0
    ) -> torch.Tensor:
        """Images of one size after preprocessing → float32 [N, 3, H, W].

        Without `normalise`: uint8 [N, H, W, 3], for an engine that does the rest itself. `first` is
        the number of the first image, by which messages call those that are no files.
        """
        tensors = [
            self.numbered(image, number, normalise=normalise)
            for number, image in enumerate(images, first)
        ]
        if len({t.shape for t in tensors}) > 1:
            shapes = sorted({tuple(t.shape) for t in tensors})
            raise ValueError(f"the images differ in size ({shapes}); set resize and crop")
        return torch.stack(tensors)

    def numbered(self, image: ImageLike, number: int, *, normalise: bool) -> torch.Tensor:
        """One image of several; what is said of it names its path, or its number."""
        try:
            return self(image) if normalise else self.pixels(image)
        except ValueError as error:
            if isinstance(image, str | Path):
                raise
            raise ValueError(f"image {number}: {error}") from error

    def _resized(self, picture: Image.Image, name: str) -> Image.Image:
        from PIL.Image import Resampling

        width, height = picture.size
        if 0 in picture.size:
            raise ValueError(f"{name} is {width}x{height}: it has no pixels")
        if self.resize is not None:
            short = min(width, height)
            width, height = self.resize * width // short, self.resize * height // short
        crop = (0, 0, width, height)
        if self.crop is not None:
            if min(width, height) < self.crop:
                raise ValueError(
                    f"{name} is {width}x{height} after resizing, smaller than the crop of "
                    f"{self.crop}; set resize to at least {self.crop}"
                )
            left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
            crop = (left, top, left + self.crop, top + self.crop)
        kept = (crop[2] - crop[0]) * (crop[3] - crop[1])
        if kept > self.max_pixels:
            raise ValueError(
                f"{name} becomes {width}x{height}, of which {kept} pixels are kept; at most "
                f"{self.max_pixels} are: set crop, or raise max_pixels"
            )
        filter = Resampling[self.interpolation.upper()]
        if width * height > _WHOLE and self.resize is not None and self.crop is not None:
            return _resized_part(picture, (width, height), crop, filter)
        if self.resize is not None:
            picture = picture.resize((width, height), filter)
        return picture if self.crop is None else picture.crop(crop)


def _resized_part(
    picture: Image.Image, size: tuple[int, int], crop: Box, filter: Resampling
) -> Image.Image:
    """Of the picture in that size no more than the crop; its numbers differ by one at most.

    They would be the same, had Pillow's boxes more digits. What the filter sees of the picture is
    cut out first, so that those there are go to its place in this part.
    """
    spans = [
        _span(crop[i], crop[i + 2], has, wanted)
        for i, (has, wanted) in enumerate(zip(picture.size, size, strict=True))
    ]
    (x, right), (y, bottom) = (outer for outer, _ in spans)
    (left, width), (top, height) = (inner for _, inner in spans)
    part = picture.crop((x, y, right, bottom))
    box = (left - x, top - y, width - x, height - y)
    return part.resize((crop[2] - crop[0], crop[3] - crop[1]), filter, box)


def _span(
    begin: int, end: int, has: int, wanted: int
) -> tuple[tuple[int, int], tuple[float, float]]:
    """Along one side, what of the picture is looked at, and what becomes the crop."""
    reach = math.ceil(_REACH * max(1, has / wanted)) + 1
    first, last = begin * has / wanted, end * has / wanted
    outer = max(0, math.floor(first) - reach), min(has, math.ceil(last) + reach)
    return outer, (first, last)


def _numbers(values: object) -> tuple[float, ...]:
    """Python's finite floats, as JSON knows them; empty where something is no such number."""
    if not isinstance(values, tuple | list):
        return ()
    try:
        found = [float(v) for v in values if not isinstance(v, bool) and isinstance(v, Real)]
    except OverflowError:
        return ()
    sound = len(found) == len(values) and all(map(math.isfinite, found))
    return tuple(found) if sound else ()


def find_images(path: str | os.PathLike[str]) -> list[Path]:
    """Image files: the file itself, or all below a folder, sorted by name.

    Raises:
        ValueError: there is no such path, or no image below it.
    """
    root, name = Path(path), named(os.fspath(path), LINE // 2)
    if os.path.isfile(root):  # Path.is_file raises for some names that no file can have
        return [root]
    if not os.path.isdir(root):
        other = f"; {name} is a pipe or a device" if os.path.exists(root) else ""
        raise ValueError(f"there is no file or folder {name}{other}")
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not found:
        raise ValueError(f"no image below {name}; looked for {', '.join(sorted(EXTENSIONS))}")
    return found


def batches(
    images: Sequence[ImageLike],
    preprocess: Preprocess,
    batch_size: int,
    *,
    normalise: bool = True,
) -> Iterator[torch.Tensor]:
    """Preprocessed batches in order; the last may be smaller. `normalise`: see `batch`."""
    for start in range(0, len(images), batch_size):
        some = images[start : start + batch_size]
        yield preprocess.batch(some, normalise=normalise, first=start)
