"""From a file, an array or one of Pillow's pictures to RGB, once its size was found to be taken.

Whoever makes a picture chooses how much memory and time it takes to decode: a hundred bytes may
stand for a gigabyte. So its header is read first, and only kinds of files that decode by themselves
are known. Pillow is imported where a picture is decoded: engines fed tensors run without it.
"""

from __future__ import annotations

import mmap
import os
import re
import sys
from io import BufferedReader
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import numpy as np

from fastres.calib.files import open_regular
from fastres.wording import LINE, named

if TYPE_CHECKING:
    from PIL import Image

ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray"
MAX_PIXELS = 2**30 // 12  # where Pillow begins to warn: 256 MiB of RGB
KINDS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
_COSTLY = ("WEBP", "JPEG2000")  # whose decoders take twice the memory of the others
_MOST_SCANS = 64  # of a progressive JPEG, each of which may pass over all pixels; ten are usual
_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")  # not stuffing, not a restart
_START_OF_SCAN, _END_OF_IMAGE, _SEQUENTIAL = b"\xda", b"\xd9", (b"\xc0", b"\xc1")
_BYTES = 8  # of a pixel at most, as four channels of 16 bits
_BESIDE = 1 << 24  # bytes of a file that are no pixels
_TURNS = {  # EXIF's orientation → what of Pillow's undoes it
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_ORIENTATION = 0x0112


def is_picture(value: object) -> TypeGuard[Image.Image]:
    """Whether it is one of Pillow's, which there are none of where nobody has imported it."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def called(image: object) -> str:
    """What messages call an image: its path, or its kind."""
    if isinstance(image, str | os.PathLike):
        try:
            return named(os.fsdecode(image), LINE // 2) or "''"
        except TypeError:  # it says that it is a path, and gives none
            return f"the {type(image).__name__}"
    return "the array" if isinstance(image, np.ndarray) else "the image"


def decode(image: ImageLike, *, exif: bool = True, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A path, PIL image or uint8 [H, W, 3] array → RGB picture.

    Args:
        exif: whether the picture is turned as its EXIF orientation says.
        max_pixels: how many it may have; no more are ever decoded. Of WEBP and JPEG 2000, half.

    Raises:
        ValueError: it is none of these, the file is no image, or is too large, or the array has
            another shape or dtype; says which image.
    """
    from PIL import Image

    name = called(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"the array is {image.dtype}{list(image.shape)}; expected uint8 [H, W, 3] in RGB"
            )
        _check_size(name, image.shape[1], image.shape[0], max_pixels)
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        return _decoded(image, name, exif, max_pixels)
    if not isinstance(image, str | os.PathLike):
        raise ValueError(
            f"an image is {type(image).__name__}; expected a path, a PIL picture, or a uint8 array "
            "[H, W, 3]"
        )
    try:
        file = open_regular(image)
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {name}") from error
    except (OSError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{name} cannot be read as an image: {reason}") from error
    with file:
        with _opened(file, name, max_pixels) as picture:
            return _decoded(picture, name, exif, max_pixels)


def _opened(file: BufferedReader, name: str, max_pixels: int) -> Image.Image:
    """The picture in a file, of which no more than the header was read."""
    from PIL import Image, UnidentifiedImageError

    Image.init()
    try:
        _check_file(file, max_pixels)
        return Image.open(file, formats=[kind for kind in KINDS if kind in Image.OPEN])
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name} cannot be read as an image: it is none of {', '.join(KINDS)}, or is damaged"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels: make it smaller, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS and max_pixels"
        ) from error
    except Exception as error:  # damaged files make Pillow's readers raise many kinds
        raise _unreadable(name, error) from error


def _decoded(picture: Image.Image, name: str, exif: bool, max_pixels: int) -> Image.Image:
    costly = picture.format in _COSTLY
    _check_size(name, *picture.size, max_pixels // 2 if costly else max_pixels)
    try:
        picture.load()
        turned = _turned(picture) if exif else picture
        rgb = _rgb(turned)
    except Exception as error:  # as above; what was not decoded yet may be damaged, too
        raise _unreadable(name, error) from error
    if rgb is None:
        raise ValueError(
            f"{name} has mode {picture.mode!r}, numbers of 32 bits with a range of their own; "
            "scale them to 8 or 16 bits first"
        )
    return rgb


def _check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(
            f"{name} is {width}x{height}, {width * height} pixels; at most {max_pixels} are taken: "
            "make it smaller, or raise max_pixels"
        )


def _turned(picture: Image.Image) -> Image.Image:
    """The picture as its EXIF says that it is meant to be seen."""
    from PIL.Image import Transpose

    try:
        turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata, of which Pillow raises many kinds, say nothing
        turn = None
    return picture if turn is None else picture.transpose(Transpose[turn])


def _rgb(picture: Image.Image) -> Image.Image | None:
    """8 bits a channel; None for 32 bits. Pillow's own conversion cuts what is above 255."""
    from PIL import Image

    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I;16"):
        to_bytes = ((np.arange(1 << 16) * 255 + 32767) // 65535).astype(np.uint8)
        picture = Image.fromarray(to_bytes[np.asarray(picture)])
    elif picture.mode in ("I", "F"):
        return None
    elif picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # where Pillow advises this in a warning
    return picture.convert("RGB")


def _check_file(file: BufferedReader, max_pixels: int) -> None:
    """Refuses files that cost more than their pixels do."""
    size, most = os.fstat(file.fileno()).st_size, _BYTES * max_pixels + _BESIDE
    if size > most:
        raise ValueError(f"it has {size} bytes; {max_pixels} pixels take at most {most}")
    if file.peek(2)[:2] == b"\xff\xd8":
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check_scans(data)


def _check_scans(data: mmap.mmap) -> None:
    """A progressive JPEG may pass over its pixels again and again, for a few bytes each time."""
    scans, at = 0, 2
    while found := _MARKER.search(data, at):
        at, marker = found.end(), found[1]
        if marker == _END_OF_IMAGE or marker in _SEQUENTIAL:
            return
        scans += marker == _START_OF_SCAN
        if scans > _MOST_SCANS:
            raise ValueError(f"it is a JPEG of more than {_MOST_SCANS} scans")
        at += int.from_bytes(data[at : at + 2], "big")


def _unreadable(name: str, error: Exception) -> ValueError:
    reason = named(str(error).partition("\n")[0]) or type(error).__name__
    return ValueError(f"{name} cannot be read as an image: {reason}")
