"""From image files to the tensor a network was trained on: decode, resize, crop, normalise.

Pillow is imported where a picture is decoded: engines fed tensors run without it.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeGuard

import msgspec
import numpy as np
import torch
from msgspec.structs import force_setattr

if TYPE_CHECKING:
    from PIL import Image

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray"
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})
_LARGEST = 2**16  # pixels of a side; Pillow takes no picture that is larger
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
    """

    resize: int | None = 256
    crop: int | None = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    scale: float = 1 / 255
    channels: Literal["RGB", "BGR"] = "RGB"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

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

    def __call__(self, image: ImageLike) -> torch.Tensor:
        """One image → float32 [3, H, W].

        Raises:
            ValueError: not an image, without pixels, or smaller than the crop.
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
        return torch.from_numpy(np.array(self._resized(decode(image))))

    def batch(self, images: Sequence[ImageLike], *, normalise: bool = True) -> torch.Tensor:
        """Images of one size after preprocessing → float32 [N, 3, H, W].

        Without `normalise`: uint8 [N, H, W, 3], for an engine that does the rest itself.
        """
        tensors = [self(image) if normalise else self.pixels(image) for image in images]
        if len({t.shape for t in tensors}) > 1:
            shapes = sorted({tuple(t.shape) for t in tensors})
            raise ValueError(f"the images differ in size ({shapes}); set resize and crop")
        return torch.stack(tensors)

    def _resized(self, picture: Image.Image) -> Image.Image:
        from PIL.Image import Resampling

        if 0 in picture.size:
            raise ValueError(f"the image is {picture.width}x{picture.height}: it has no pixels")
        if self.resize is not None:
            width, height = picture.size
            short = min(width, height)
            size = (self.resize * width // short, self.resize * height // short)
            picture = picture.resize(size, Resampling[self.interpolation.upper()])
        if self.crop is not None:
            width, height = picture.size
            if min(width, height) < self.crop:
                raise ValueError(
                    f"the image is {width}x{height} after resizing, smaller than the crop of "
                    f"{self.crop}; set resize to at least {self.crop}"
                )
            left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
            picture = picture.crop((left, top, left + self.crop, top + self.crop))
        return picture


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


def is_picture(value: object) -> TypeGuard[Image.Image]:
    """Whether it is one of Pillow's, which there are none of where nobody has imported it."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def decode(image: ImageLike) -> Image.Image:
    """A path, PIL image or uint8 [H, W, 3] array → RGB picture.

    Raises:
        ValueError: it is none of these, the file is no image, or the array has another shape or
            dtype.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(image, Image.Image):
        return _rgb(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"the array is {image.dtype}{list(image.shape)}; expected uint8 [H, W, 3] in RGB"
            )
        return Image.fromarray(image)
    if not isinstance(image, str | os.PathLike):
        raise ValueError(
            f"an image is {type(image).__name__}; expected a path, a PIL picture, or a uint8 array "
            "[H, W, 3]"
        )
    try:
        with Image.open(image) as picture:
            return _rgb(picture)
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {os.fspath(image)}") from error
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{os.fspath(image)} cannot be read as an image: {error}") from error


def _rgb(picture: Image.Image) -> Image.Image:
    """8 bits a channel. Pillow's own conversion cuts whatever is above 255 to white."""
    from PIL import Image

    if picture.mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.uint32)
        picture = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise ValueError(
            f"the image has mode {picture.mode!r}, numbers of 32 bits with a range of their own; "
            "scale them to 8 or 16 bits first"
        )
    return picture.convert("RGB")


def find_images(path: str | os.PathLike[str]) -> list[Path]:
    """Image files: the file itself, or all below a folder, sorted by name.

    Raises:
        ValueError: there is no such path, or no image below it.
    """
    root = Path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ValueError(f"there is no file or folder {root}")
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not found:
        raise ValueError(f"no image below {root}; looked for {', '.join(sorted(EXTENSIONS))}")
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
        yield preprocess.batch(images[start : start + batch_size], normalise=normalise)
