"""The photographs that benchmarks are fed."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.children import ROOT
from fastres.calib.images import Preprocess, find_images

PHOTOS = ROOT / "examples" / "photos"


def photographs(batch_size: int, image_size: int = 224) -> Tensor:
    """[N, 3, H, W] fp32: the example photographs in turn, normalised."""
    preprocess = Preprocess(resize=image_size * 256 // 224, crop=image_size)
    pictures = preprocess.batch(find_images(PHOTOS))
    return pictures[torch.arange(batch_size) % len(pictures)]
