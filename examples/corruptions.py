"""Mildly damaged pictures: what is left of a network's accuracy where the pictures are worse.

Each kind is a function of pictures and seed alone; NumPy and Pillow are all it needs.

Source: in the manner of Hendrycks and Dietterich 2019 (arXiv:1903.12261), at strengths of our own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from fastres.errors import InputError

_Draw = np.random.Generator
_Kind = Callable[[np.ndarray, _Draw], np.ndarray]


def corrupted(images: np.ndarray, kind: str, seed: int) -> np.ndarray:
    """The same pictures, each damaged a little in its own way.

    Strengths are in parts of a side or of the range, so they mean the same at every size. What
    happens to a picture depends on its place among `images`.

    Args:
        images: [N, H, W, 3] uint8.
        kind: one of KINDS.
        seed: at least 0.

    Returns:
        [N, H, W, 3] uint8, new memory.

    Raises:
        InputError: the kind is unknown, or the pictures have another dtype or shape.
    """
    if kind not in KINDS:
        raise InputError(f"there is no corruption {kind!r}; there are {', '.join(KINDS)}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(
            f"the pictures are {images.dtype}{list(images.shape)}; expected uint8 [N, H, W, 3]"
        )
    if not len(images):
        return images.copy()
    draw = np.random.default_rng([seed, tuple(KINDS).index(kind)])
    found = KINDS[kind](images, draw)
    return found if found.dtype == np.uint8 else found.round().clip(0, 255).astype(np.uint8)


def _shift(images: np.ndarray, draw: _Draw) -> np.ndarray:
    moves = _either_sign(draw, 0.10, 0.19, (len(images), 2))
    return _affine(images, np.broadcast_to(np.eye(2), (len(images), 2, 2)), moves)


def _rotate(images: np.ndarray, draw: _Draw) -> np.ndarray:
    angle = np.deg2rad(_either_sign(draw, 10, 20, len(images)))
    rows = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    return _affine(images, np.array(rows).transpose(2, 0, 1))


def _scale(images: np.ndarray, draw: _Draw) -> np.ndarray:
    factor = np.exp(_either_sign(draw, 0.15, 0.3, (len(images), 1, 1)))
    return _affine(images, np.eye(2) * factor)


def _shear(images: np.ndarray, draw: _Draw) -> np.ndarray:
    matrix = np.tile(np.eye(2), (len(images), 1, 1))
    matrix[:, 0, 1] = _either_sign(draw, 0.15, 0.35, len(images))
    return _affine(images, matrix)


def _gaussian_noise(images: np.ndarray, draw: _Draw) -> np.ndarray:
    found: np.ndarray = images + draw.normal(0, 30, (*images.shape[:3], 1))
    return found


def _speckle(images: np.ndarray, draw: _Draw) -> np.ndarray:
    found: np.ndarray = images * draw.normal(1, 0.25, (*images.shape[:3], 1))
    return found


def _salt_and_pepper(images: np.ndarray, draw: _Draw) -> np.ndarray:
    chance = draw.random((*images.shape[:3], 1))
    return np.where(chance < 0.02, 0, np.where(chance > 0.98, 255, images)).astype(np.uint8)


def _blur(images: np.ndarray, draw: _Draw) -> np.ndarray:
    radii = draw.uniform(0.05, 0.08, len(images)) * images.shape[1]
    return _each(images, lambda i, p: p.filter(ImageFilter.GaussianBlur(float(radii[i]))))


def _motion_blur(images: np.ndarray, draw: _Draw) -> np.ndarray:
    across = draw.random(len(images)) < 0.5
    reach = max(1, round(0.13 * images.shape[1]))  # of a mean over 2 reach + 1 pixels
    found = np.empty(images.shape)
    for axis, rows in ((2, across), (1, ~across)):
        chosen = images[rows].astype(np.float64)
        padding = [(reach, reach) if i == axis else (0, 0) for i in range(4)]
        padded = np.pad(chosen, padding, mode="edge")
        width = images.shape[axis]
        steps = range(2 * reach + 1)
        found[rows] = sum(np.take(padded, range(s, s + width), axis) for s in steps) / len(steps)
    return found


def _contrast(images: np.ndarray, draw: _Draw) -> np.ndarray:
    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    found: np.ndarray = mean + (images - mean) * draw.uniform(0.75, 0.88, (len(images), 1, 1, 1))
    return found


def _brightness(images: np.ndarray, draw: _Draw) -> np.ndarray:
    found: np.ndarray = images + _either_sign(draw, 25, 50, (len(images), 1, 1, 1))
    return found


def _pixelate(images: np.ndarray, draw: _Draw) -> np.ndarray:
    height, width = images.shape[1:3]
    parts = draw.uniform(0.17, 0.23, len(images))

    def coarse(i: int, picture: Image.Image) -> Image.Image:
        small = (max(1, round(width * parts[i])), max(1, round(height * parts[i])))
        return picture.resize(small, Image.Resampling.BOX).resize(
            (width, height), Image.Resampling.NEAREST
        )

    return _each(images, coarse)


def _occlude(images: np.ndarray, draw: _Draw) -> np.ndarray:
    found = images.copy()
    for picture in found:
        height, width = (max(1, int(side * draw.uniform(0.2, 0.4))) for side in picture.shape[:2])
        top = draw.integers(picture.shape[0] - height + 1)
        left = draw.integers(picture.shape[1] - width + 1)
        picture[top : top + height, left : left + width] = draw.integers(256)
    return found


KINDS: dict[str, _Kind] = {
    "shift": _shift,
    "rotate": _rotate,
    "scale": _scale,
    "shear": _shear,
    "gaussian_noise": _gaussian_noise,
    "speckle": _speckle,
    "salt_and_pepper": _salt_and_pepper,
    "blur": _blur,
    "motion_blur": _motion_blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "pixelate": _pixelate,
    "occlude": _occlude,
}


def _either_sign(draw: _Draw, low: float, high: float, shape: int | tuple[int, ...]) -> np.ndarray:
    """Uniform in [low, high] or in [-high, -low]: never so little that nothing happens."""
    found: np.ndarray = draw.uniform(low, high, shape) * draw.choice([-1, 1], shape)
    return found


def _each(images: np.ndarray, change: Callable[[int, Image.Image], Image.Image]) -> np.ndarray:
    pictures = (Image.fromarray(picture) for picture in images)
    return np.stack([np.asarray(change(i, picture)) for i, picture in enumerate(pictures)])


def _affine(
    images: np.ndarray, matrices: np.ndarray, moves: np.ndarray | None = None
) -> np.ndarray:
    """Each output pixel p reads at A (p - centre) + centre + move; black outside.

    Args:
        matrices: [N, 2, 2], rows x and y.
        moves: [N, 2] in parts of a side, x and y; None for none.
    """
    height, width = images.shape[1:3]
    centre = np.array([width, height]) / 2
    steps = np.zeros((len(images), 2)) if moves is None else moves * [width, height]
    offsets = centre + steps - matrices @ centre

    def moved(i: int, picture: Image.Image) -> Image.Image:
        (a, b), (d, e) = matrices[i].tolist()
        c, f = offsets[i].tolist()
        return picture.transform(
            picture.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR
        )

    return _each(images, moved)
