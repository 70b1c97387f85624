"""Pictures of strangers: how large they may be, what is read at all, and how they are turned."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastres.calib.decoding import KINDS, MAX_PIXELS, decode
from fastres.calib.images import Preprocess, find_images

SMALL = Preprocess(resize=18, crop=16)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *before: bytes, rows: bytes = b"") -> bytes:
    """A PNG that says it is so large, whatever its rows are."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", size), *before, chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def whole(picture: Image.Image, p: Preprocess) -> Image.Image:
    """As anybody resizes and crops it."""
    assert p.resize is not None and p.crop is not None
    short = min(picture.size)
    width, height = (p.resize * size // short for size in picture.size)
    picture = picture.resize((width, height), Image.Resampling[p.interpolation.upper()])
    left, top = round((width - p.crop) / 2), round((height - p.crop) / 2)
    return picture.crop((left, top, left + p.crop, top + p.crop))


def noise(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width * height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "size",
    [(640, 480), (333, 500), (37, 51), (3000, 20), (20, 3000), (1, 1), (255, 257), (600, 11)],
)
@pytest.mark.parametrize("sides", [(256, 224), (50, 33), (16, 16)])
def test_usual_pictures_have_the_numbers_they_always_had(
    size: tuple[int, int], sides: tuple[int, int], interpolation: str
) -> None:
    p = Preprocess(resize=sides[0], crop=sides[1], interpolation=interpolation)  # type: ignore[arg-type]
    picture = noise(*size)
    assert np.array_equal(p.pixels(picture).numpy(), np.asarray(whole(picture, p)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(3000, 3), (3, 3000), (9000, 9), (2048, 2), (40_000, 50)])
def test_of_long_ones_only_what_the_crop_keeps_is_resized(
    size: tuple[int, int], interpolation: str
) -> None:
    p = Preprocess(interpolation=interpolation)  # type: ignore[arg-type]
    picture = noise(*size)
    got, want = p.pixels(picture).int(), torch.from_numpy(np.array(whole(picture, p))).int()
    assert (got - want).abs().max() <= 1 and (got != want).float().mean() < 0.01


@pytest.mark.parametrize("size", [(65_000, 1), (1, 65_000), (65_000, 3), (2_000_000, 1)])
def test_long_pictures_take_little_memory(size: tuple[int, int]) -> None:
    import resource

    picture = Image.new("RGB", size, (9, 8, 7))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert Preprocess().pixels(picture).flatten(0, 1).unique(dim=0).tolist() == [[9, 8, 7]]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_pixels_are_counted_before_they_are_decoded(tmp_path: Path) -> None:
    path, few = tmp_path / "a.png", Preprocess(max_pixels=10_000)
    path.write_bytes(png(9000, 9000, rows=zlib.compress(bytes(9000 * 27001))))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"a\.png is 9000x9000, 81000000 pixels; at most 10000"):
        few(path)
    assert tracemalloc.get_traced_memory()[1] < 5 << 20
    tracemalloc.stop()
    for image in (Image.new("RGB", (101, 100)), np.zeros((101, 100, 3), np.uint8)):
        with pytest.raises(ValueError, match="10100 pixels; at most 10000 are taken"):
            few(image)  # type: ignore[arg-type]


def test_pixels_are_counted_after_resizing() -> None:
    picture = Image.new("RGB", (30_000, 10))
    for p in (Preprocess(crop=None), Preprocess(resize=20_000, crop=20_000)):
        with pytest.raises(ValueError, match="pixels are kept; at most 89478485 are: set crop"):
            p(picture)


@pytest.mark.parametrize("size", [(9500, 9500), (2**31 - 1, 1), (2**20, 2**20)])
@pytest.mark.parametrize("filter", ["ignore", "error"])
def test_the_limit_is_where_pillow_warns(
    tmp_path: Path, size: tuple[int, int], filter: str
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(*size))
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"a\.png .*raise .*max_pixels"):
        warnings.simplefilter(filter)  # type: ignore[arg-type]
        Preprocess()(path)


@pytest.mark.parametrize("kind", ["WEBP", "JPEG2000"])
def test_costly_kinds_may_have_half_as_many(tmp_path: Path, kind: str) -> None:
    noise(30, 40).save(tmp_path / "a", kind)
    assert decode(tmp_path / "a", max_pixels=2400).size == (30, 40)
    with pytest.raises(ValueError, match="a is 30x40, 1200 pixels; at most 1199 are taken"):
        decode(tmp_path / "a", max_pixels=2399)


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "9", 2**30 + 1])
def test_limits_that_are_none(limit: int) -> None:
    with pytest.raises(
        ValueError, match="max_pixels is .*; it must be an integer of 1 to 1073741824"
    ):
        Preprocess(max_pixels=limit)
    with pytest.raises(ValueError, match="exif is 1; give True or False"):
        Preprocess(exif=1)  # type: ignore[arg-type]


def progressive(scans: int) -> bytes:
    """A JPEG whose last scan comes so many times more."""
    made = io.BytesIO()
    noise(64, 64).save(made, "jpeg", progressive=True)
    data = made.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (scans + 1) + data[-2:]


def another_kind() -> bytes:
    made = io.BytesIO()
    noise(20, 20).save(made, "tga")
    return made.getvalue()


BOMBS = {
    "a kind that is not read": another_kind(),
    "a text": png(4, 4, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 24)))),
    "a profile": png(4, 4, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(1 << 24)))),
    "scans": progressive(200),
    "half": png(64, 64, rows=zlib.compress(bytes(100))),
    "no picture": b"<html>",
    "empty": b"",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n",  # a program runs it
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_files_that_are_refused_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd one.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"odd one\.png cannot be read as an image: "):
        SMALL(path)


def test_some_scans_are_usual(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(progressive(20))
    assert SMALL(tmp_path / "a.jpg").shape == (3, 16, 16)


def test_a_file_much_larger_than_its_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(4, 4))
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # sparse: it takes no room
    with pytest.raises(
        ValueError, match=r"it has 1099511627776 bytes; 89478485 pixels take at most"
    ):
        SMALL(path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", tmp_path / "link.jpg", Path("/dev/zero")):
        with pytest.raises(
            ValueError, match=f"{path} cannot be read as an image: it is a pipe or a"
        ):
            SMALL(path)
        with pytest.raises(
            ValueError, match=f"no file or folder {path}; {path} is a pipe or a dev"
        ):
            find_images(path)
    with pytest.raises(ValueError, match="no image below"):
        find_images(tmp_path)


class Odd(os.PathLike[str]):
    def __fspath__(self) -> str:
        return 5  # type: ignore[return-value]


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for name, said in (
        ("a\0b.jpg", r"there is no file a\\x00b.jpg"),
        ("x" * 300, "x{300} cannot be read as an image: File name too long"),
        ("", "there is no file ''"),
        (tmp_path, "it is a folder"),
        (Odd(), "the Odd cannot be read as an image: expected Odd.__fspath__"),
    ):
        with pytest.raises(ValueError, match=said):
            SMALL(name)
    for name in ("a\0b.jpg", "x" * 300):
        with pytest.raises(ValueError, match="there is no file or folder"):
            find_images(name)
    with pytest.raises(ValueError) as caught:
        SMALL(tmp_path / "\x1b[31mred\n.jpg")
    assert "\\x1b[31mred\\n.jpg" in str(caught.value)


def test_pictures_of_pillow_that_are_broken(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(BOMBS["half"])
    with Image.open(tmp_path / "a.png") as lazy, pytest.raises(ValueError, match="is truncated"):
        SMALL(lazy)
    closed = Image.new("RGB", (9, 9))
    closed.close()
    with pytest.raises(ValueError, match="closed image"):
        SMALL(closed)
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match=f"image 1: the image has mode '{mode}'"):
            SMALL.batch([noise(9, 9), Image.new(mode, (9, 9))])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read(tmp_path: Path, kind: str) -> None:
    if kind not in Image.SAVE:
        Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"Pillow writes no {kind} here")
    picture = noise(24, 20)
    picture.save(tmp_path / "a", kind)
    with Image.open(tmp_path / "a") as expected:
        assert np.array_equal(
            np.asarray(decode(tmp_path / "a")), np.asarray(expected.convert("RGB"))
        )


def test_a_palette_with_transparency(tmp_path: Path) -> None:
    picture = noise(24, 20).convert("P")
    picture.save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert np.array_equal(
        np.asarray(decode(tmp_path / "a.png")), np.asarray(picture.convert("RGB"))
    )


def stored(path: Path, seen: Image.Image, orientation: int) -> None:
    """Writes a picture as a camera does that is held so."""
    tag = Image.Exif()
    tag[0x0112] = orientation
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    turned = seen.transpose(turns[orientation]) if orientation in turns else seen
    turned.save(path, exif=tag)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tiff"])
@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_seen_as_they_are_shown(tmp_path: Path, orientation: int, suffix: str) -> None:
    seen, path = noise(21, 14).resize((42, 28), Image.Resampling.NEAREST), tmp_path / f"a{suffix}"
    stored(path, seen, orientation)
    with Image.open(path) as opened:
        shown = ImageOps.exif_transpose(opened).convert("RGB")
        assert np.array_equal(np.asarray(decode(path)), np.asarray(shown))
        assert torch.equal(SMALL(opened), SMALL(shown))
    if suffix == ".png":
        assert torch.equal(SMALL(path), SMALL(seen))
        with Image.open(path) as opened:
            as_stored = np.asarray(opened.convert("RGB"))
        assert np.array_equal(np.asarray(decode(path, exif=False)), as_stored)


def test_damaged_orientations_say_nothing(tmp_path: Path) -> None:
    picture = noise(20, 10)
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*", b"Exif\0\0" + bytes(40), b"x"):
        picture.save(tmp_path / "a.png", exif=exif)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert np.array_equal(np.asarray(decode(tmp_path / "a.png")), np.asarray(picture))
