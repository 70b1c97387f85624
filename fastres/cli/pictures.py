"""Pictures for commands that need some: from files, or made in code, the same at every call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastres.cli.flags import numbers
from fastres.cli.targets import Shape, Target
from fastres.errors import InputError, described

if TYPE_CHECKING:
    import torch

    from fastres.calib.images import Preprocess

_TO_SETTLE = 8  # pictures at least: BatchNorm needs several values per channel


def preprocess_for(shape: Shape) -> Preprocess:
    """ImageNet's: the shorter side to 256/224 of the image's, the middle of that, mean and std.

    Raises:
        InputError: the network does not take square RGB pictures.
    """
    from fastres.calib.images import Preprocess

    channels, height, width = shape
    if channels != 3 or height != width:
        raise InputError(f"images become square RGB pictures; the network takes {list(shape)}")
    return Preprocess(resize=height * 256 // 224, crop=height)


def adjusted(
    start: Preprocess,
    *,
    resize: int | None,
    crop: int | None,
    mean: str | None,
    std: str | None,
    exif: bool | None = None,
    max_pixels: int | None = None,
) -> Preprocess:
    """A preprocess with what the flags of these names say; a crop alone sets the resizing too.

    Raises:
        InputError: numbers that are none, or do not go together.
    """
    import msgspec

    changed = {
        "resize": resize or (crop and crop * 256 // 224),
        "crop": crop,
        "mean": mean and numbers("--mean", mean, 3),
        "std": std and numbers("--std", std, 3),
        "exif": exif,
        "max_pixels": max_pixels,
    }
    given = {key: value for key, value in changed.items() if value is not None}
    try:
        return msgspec.structs.replace(start, **given)
    except ValueError as error:
        raise InputError(str(error)) from error


def read(path: Path, target: Target) -> torch.Tensor:
    """All image files at or below a path, as the target takes them.

    Raises:
        InputError: there is none, one is unreadable, or the network takes no such pictures.
    """
    from fastres.calib.images import find_images

    try:
        preprocess, images = preprocess_for(target.shape), find_images(path)
        return preprocess.batch(images, normalise=not target.normalises).to(target.dtype)
    except ValueError as error:
        raise InputError(str(error)) from error


def settle(target: Target, data: torch.Tensor | None = None) -> None:
    """Gives an untrained network BatchNorms whose every term matters, in place.

    Args:
        data: pictures to settle on; where there are few, or none, synthetic ones help out.

    Raises:
        InputError: it cannot be settled.
    """
    import torch
    from torch import nn

    from fastres import models

    assert isinstance(target.model, nn.Module), "only a model can be untrained"
    given = [] if data is None else [data]
    missing = _TO_SETTLE - sum(map(len, given))
    enough = torch.cat([*given, synthetic(missing, target)]) if missing > 0 else given[0]
    try:
        models.settle(target.model, enough)
    except ValueError as error:
        raise InputError(f"{target.name} cannot be settled: {error}; give --weights") from error
    except Exception as error:  # the user's code may raise anything
        raise InputError(
            f"{target.name} cannot be run with {enough.dtype} {list(enough.shape)}: it raised "
            f"{described(error)}"
        ) from error


def physical_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def synthetic(count: int, target: Target) -> torch.Tensor:
    """[N, C, H, W]: smooth random fields, mean 0 and deviation 1, as photographs normalised; for
    an engine that normalises, uint8 [N, H, W, 3] around 128.

    Amplitudes fall as 1/f, as in photographs, where white noise would average out in the first
    convolution; channels share most of their light. The first pictures of a longer batch are those
    of a shorter one.

    Source: Field 1987, "Relations between the statistics of natural images".

    Raises:
        InputError: this machine has no memory for so many, or such large ones.
    """
    import torch

    channels, height, width = target.shape
    needed, memory = 4 * count * channels * height * width, physical_memory()
    if needed > memory:
        raise InputError(
            f"{count} pictures of {height} x {width} take {needed / 2**30:.0f} GiB; this machine "
            f"has {memory / 2**30:.0f}: give a smaller --batch-size or --image-size"
        )
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :]
    frequency = (rows.square() + columns.square()).sqrt().clamp_min(1 / max(height, width))
    pictures = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(channels + 1, height, width, generator=generator)
        fields = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(height, width))
        light = 0.9 * fields[:1] + 0.4 * fields[1:]
        pictures.append((light - light.mean()) / light.std().clamp_min(1e-6))
    batch = torch.stack(pictures)
    if target.normalises:
        batch = (128 + 56 * batch).clamp(0, 255).permute(0, 2, 3, 1).contiguous()
    return batch.to(target.dtype)
