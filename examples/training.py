"""The training loop: a network, pictures in memory and a recipe; no files, no command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Pictures
from recipes import (
    EarlyStopping,
    Recipe,
    augmented,
    cross_entropy,
    learning_rate,
    mixed,
    optimiser,
    targets,
)
from torch import Tensor, nn

from fastres.calib.images import Preprocess
from fastres.errors import InputError

_STEPS = 20  # an epoch has at least as many: a batch of 256 would leave the digits five
_AT_ONCE = 256  # pictures of one evaluation step


@dataclass(frozen=True)
class Epoch:
    """One epoch, counted from 1; the last two are NaN without validation pictures."""

    number: int
    rate: float
    loss: float
    validation_loss: float
    validation_accuracy: float

    def __str__(self) -> str:
        said = f"epoch {self.number:3}  rate {self.rate:.5f}  loss {self.loss:.4f}"
        if np.isnan(self.validation_loss):
            return said
        return f"{said}  validation {self.validation_loss:.4f}, {self.validation_accuracy:.2%}"


def train(
    model: nn.Module,
    pictures: Pictures,
    recipe: Recipe,
    preprocess: Preprocess,
    *,
    validation: Pictures | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    mirror: bool | None = None,
    padding: int = 4,
    seed: int = 0,
    frozen: Sequence[nn.Module] = (),
    report: Callable[[Epoch], None] | None = None,
) -> int:
    """Trains a network in place and leaves it in eval(); uses torch's threads as they are set.

    Args:
        model: [N, 3, H, W] fp32 → logits [N, len(pictures.classes)].
        pictures: what to learn from, all in memory; cropped and mirrored anew in each epoch.
        preprocess: its mean and std; resize and crop are ignored, since the pictures have one size.
        validation: what early stopping watches; never learnt from.
        epochs: None for the recipe's.
        batch: None for the recipe's, or less if that left fewer than 20 steps an epoch.
        mirror: None where the pictures allow it.
        padding: pixels around a picture before a crop of its old size is taken.
        seed: of order, crops, mirrors and MixUp.
        frozen: layers from `networks.freeze`.
        report: called after each epoch.

    Returns:
        The epoch whose weights the model has, counted from 1; 0 if it was not trained.

    Raises:
        InputError: a number is out of range, or the loss is no longer finite.
    """
    epochs = recipe.epochs if epochs is None else epochs
    batch = batch_size(recipe, len(pictures)) if batch is None else batch
    if epochs < 0 or batch < 2 or padding < 0:
        raise InputError(f"{epochs=}, {batch=}, {padding=}: give at least 0, 2 and 0")
    batch = min(batch, len(pictures))
    mirror = pictures.mirrors if mirror is None else mirror
    draw = np.random.default_rng(seed)
    images, labels = torch.from_numpy(pictures.images), torch.from_numpy(pictures.labels)
    steps = optimiser(model, recipe)
    stopping = None
    if validation is not None and recipe.patience is not None:
        stopping = EarlyStopping(recipe.patience)
    model.to(memory_format=torch.channels_last)  # a fifth to a third faster on CPUs
    for epoch in range(epochs):
        rate = learning_rate(recipe, epoch, epochs, batch)
        for group in steps.param_groups:
            group["lr"] = rate
        model.train()
        for layer in frozen:
            layer.eval()
        order = torch.from_numpy(draw.permutation(len(pictures)))
        losses = []
        # What is left at the end of an epoch is left out: statistics of a few pictures are noise.
        for rows in order[: len(order) // batch * batch].split(batch):
            cut = augmented(images[rows], draw, mirror=mirror, padding=padding)
            wanted = targets(labels[rows], len(pictures.classes), recipe.smoothing)
            x, wanted = mixed(_normalised(cut, preprocess), wanted, draw, recipe.mixup)
            loss = cross_entropy(model(x), wanted)
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses.append(loss.item())
        held = (np.nan, np.nan) if validation is None else evaluate(model, validation, preprocess)
        if not np.isfinite(losses).all() or (validation is not None and np.isnan(held[1])):
            raise InputError(
                f"the loss is not finite in epoch {epoch + 1} at a learning rate of {rate:g}; "
                "give a lower one"
            )
        if report is not None:
            report(Epoch(epoch + 1, rate, float(np.mean(losses)), held[1], held[0]))
        if stopping is not None and stopping.update(epoch, held[1], model):
            break
    if stopping is not None:
        stopping.restore(model)
        epochs = stopping.epoch + 1
    model.eval()
    return epochs


def batch_size(recipe: Recipe, pictures: int) -> int:
    """The recipe's, halved until an epoch has 20 steps or a batch has 16 pictures."""
    size = recipe.batch
    while size > 16 and pictures // size < _STEPS:
        size //= 2
    return size


def evaluate(model: nn.Module, pictures: Pictures, preprocess: Preprocess) -> tuple[float, float]:
    """(accuracy, mean cross entropy) of a network on pictures as they are; leaves it in eval()."""
    model.eval()
    right, loss = 0, 0.0
    with torch.inference_mode():
        for start in range(0, len(pictures), _AT_ONCE):
            images = torch.from_numpy(pictures.images[start : start + _AT_ONCE])
            labels = torch.from_numpy(pictures.labels[start : start + _AT_ONCE])
            logits = model(_normalised(images, preprocess))
            right += int((logits.argmax(1) == labels).sum())
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return right / len(pictures), loss / len(pictures)


def statistics(pictures: Pictures) -> Preprocess:
    """Mean and std of each channel over all pixels, to four digits; no resizing."""
    mean, std = (
        tuple(round(float(v) / 255, 4) for v in found)
        for found in (pictures.images.mean(axis=(0, 1, 2)), pictures.images.std(axis=(0, 1, 2)))
    )
    if min(std) == 0:
        raise InputError("a channel has the same value in every pixel; there is nothing to learn")
    return Preprocess(resize=None, crop=None, mean=mean, std=std)


def _normalised(images: Tensor, preprocess: Preprocess) -> Tensor:
    """[N, H, W, 3] uint8 → [N, 3, H, W] fp32 in channels_last."""
    mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
    return ((images * preprocess.scale - mean) / std).permute(0, 3, 1, 2)
