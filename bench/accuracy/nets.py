"""The networks whose accuracy is measured, each with pictures that it has not learnt from.

Either the two of examples/weights with the fifth of the digits held out from them, or the same two
trained five times, each time on four fifths, so that every digit is held out once.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from corruptions import KINDS, corrupted
from datasets import Pictures, folds, split
from networks import facts_of, network, preprocess_of, save, take_over
from recipes import NVIDIA, Recipe
from torch import nn
from training import batch_size, statistics, train

from bench.children import ROOT
from fastres.calib.images import Preprocess
from fastres.timing.peers_torch import torch_threads

CACHE = ROOT / "build" / "accuracy"
WEIGHTS = ROOT / "examples" / "weights"
CLEAN = "clean"
VERSIONS = (CLEAN, *KINDS)  # of every picture
RECIPES: dict[str, Recipe] = {  # as the README of examples/weights has them
    "resnet20": replace(NVIDIA, epochs=40),
    "bottleneck": replace(NVIDIA, epochs=28, mixup=0.0),
}
_TRAINING = ("training.py", "recipes.py")  # what else than data and recipe makes the weights
_CODE = tuple(ROOT / "examples" / name for name in _TRAINING)


@dataclass(frozen=True)
class Trained:
    """A network and the pictures it may be judged by.

    Args:
        model: [N, 3, 32, 32] fp32 -> logits [N, 10], in eval().
        preprocess: what it was trained with.
        training: what it learnt from; calibration draws from these alone.
        held: indices of the pictures that it has not seen, into all digits.
    """

    model: nn.Module
    preprocess: Preprocess
    training: Pictures
    held: np.ndarray


def committed(name: str, everything: Pictures) -> list[Trained]:
    """The network of examples/weights with its held-out fifth."""
    rows, held = split(everything.labels, 0.2, 0)
    file = WEIGHTS / f"digits_{name}.safetensors"
    model = network(name)
    take_over(model, file)
    preprocess = preprocess_of(facts_of(file))
    assert preprocess is not None
    return [Trained(model.eval(), preprocess, everything.take(rows), held)]


def trained_on_folds(
    name: str, everything: Pictures, count: int, seed: int, epochs: int | None
) -> Iterator[Trained]:
    """The network trained `count` times, each time without one fold; kept under build/accuracy."""
    recipe = RECIPES[name] if epochs is None else replace(RECIPES[name], epochs=epochs)
    for i, held in enumerate(folds(everything.labels, count, seed)):
        training = everything.take(np.setdiff1d(np.arange(len(everything)), held))
        label = f"{name}, fold {i + 1} of {count}"
        model, preprocess = _trained(name, training, recipe, seed, label)
        yield Trained(model, preprocess, training, held)


def versions(everything: Pictures, held: np.ndarray, seed: int) -> np.ndarray:
    """Held-out pictures, clean and damaged in every way.

    Returns:
        [len(VERSIONS), N, H, W, 3] uint8, in the order of VERSIONS.
    """
    clean = everything.images[held]
    return np.stack([clean, *(corrupted(clean, kind, seed) for kind in KINDS)])


def _trained(
    name: str, training: Pictures, recipe: Recipe, seed: int, label: str
) -> tuple[nn.Module, Preprocess]:
    """From the cache if it was made by the same; else trained, on one thread, and kept."""
    model = network(name, len(training.classes), seed)
    preprocess = statistics(training)
    file = CACHE / f"{name}-{_key(model, training, recipe, seed)}.safetensors"
    if file.exists():
        take_over(model, file)
        return model.eval(), preprocess
    start = time.perf_counter()
    with torch_threads(1):  # the same bytes at every run; networks this small gain by no more
        train(
            model,
            training,
            recipe,
            preprocess,
            batch=batch_size(recipe, len(training)),
            seed=seed,
            report=lambda epoch: _say(f"{label}: {epoch}") if sys.stderr.isatty() else None,
        )
    _say(f"trained {label}: {recipe.epochs} epochs in {time.perf_counter() - start:.0f} s")
    whole = file.with_suffix(".partial")
    save(model, whole, preprocess, {"model": name, "recipe": asdict(recipe), "seed": seed})
    whole.replace(file)
    return model, preprocess


def _key(model: nn.Module, training: Pictures, recipe: Recipe, seed: int) -> str:
    """Of all that decides the weights: initial ones, pictures, recipe, seed, code, PyTorch."""
    found = hashlib.sha256(json.dumps([asdict(recipe), seed, torch.__version__]).encode())
    for key, value in model.state_dict().items():
        found.update(key.encode() + value.numpy().tobytes())
    for array in (training.images, training.labels):
        found.update(np.ascontiguousarray(array).tobytes())
    for file in _CODE:
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
