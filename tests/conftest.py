"""Real pictures for every test that compares networks: noise hides errors that photos show."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def _normalised(picture: Image.Image) -> Tensor:  # -> [3, H, W] fp32
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)
    return ((pixels - MEAN) / STD).contiguous()


@pytest.fixture(scope="session")
def pictures() -> tuple[Image.Image, ...]:
    """The three example photographs, decoded."""
    names = ("astronaut.jpg", "chelsea.jpg", "coffee.jpg")
    return tuple(Image.open(PHOTOS / name).convert("RGB") for name in names)


@pytest.fixture(scope="session")
def photos(pictures: tuple[Image.Image, ...]) -> Tensor:
    """[3, 3, 224, 224] fp32: centre crops of the photographs, normalised as ImageNet's."""
    size = (224, 224)
    crops = [ImageOps.fit(picture, size, Image.Resampling.BILINEAR) for picture in pictures]
    return torch.stack([_normalised(crop) for crop in crops])


@pytest.fixture(scope="session")
def photo_batch(pictures: tuple[Image.Image, ...]) -> Callable[[int, int], Tensor]:
    """photo_batch(n, size) -> [n, 3, size, size] fp32: crops and flips, the same at every call.

    The first pictures of a longer batch are those of a shorter one.
    """

    def batch(n: int, size: int) -> Tensor:
        out = torch.empty(n, 3, size, size)
        for i in range(n):
            draw = random.Random(i)
            picture = pictures[i % len(pictures)]
            side = int(min(picture.size) * draw.uniform(0.4, 1.0))
            left = draw.randint(0, picture.width - side)
            top = draw.randint(0, picture.height - side)
            crop = picture.resize(
                (size, size),
                Image.Resampling.BILINEAR,
                box=(left, top, left + side, top + side),
            )
            out[i] = _normalised(ImageOps.mirror(crop) if draw.random() < 0.5 else crop)
        return out

    return batch
