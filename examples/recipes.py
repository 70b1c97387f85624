"""Two published ways to train a residual network, as data and as functions of tensors.

Sources: the CIFAR recipe is that of He et al. 2015, section 4.2, in the form of common tutorials;
the other that of NVIDIA's ResNet-50 v1.5 (Deep Learning Examples), after Goyal et al. 2017
(arXiv:1706.02677), Szegedy et al. 2015 (arXiv:1512.00567) and Zhang et al. 2017 (arXiv:1710.09412).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Args:
        lr: learning rate for batches of `lr_batch`, scaled linearly to other sizes; None of
            `lr_batch` leaves it as it is.
        momentum: of SGD. Adam keeps its own 0.9 and 0.999.
        weight_decay: L2, on convolutions and the head's weight; on BatchNorm and biases only if
            `decay_all`.
        schedule: "step" multiplies by 0.1 every 30 epochs, "cosine" falls to 0 at the end.
        warmup: epochs in which the rate rises linearly to its full value.
        smoothing: share of each label that is spread over all classes.
        mixup: alpha of MixUp's Beta distribution; 0 mixes nothing.
        patience: epochs without a lower loss on validation pictures before training stops and goes
            back to the best epoch; None trains to the end and keeps that.
    """

    name: str
    optimizer: Literal["sgd", "adam"]
    lr: float
    lr_batch: int | None
    momentum: float
    weight_decay: float
    decay_all: bool
    schedule: Literal["step", "cosine"]
    warmup: int
    smoothing: float
    mixup: float
    patience: int | None
    epochs: int
    batch: int


CIFAR = Recipe(
    name="cifar",
    optimizer="sgd",
    lr=0.1,
    lr_batch=None,
    momentum=0.9,
    weight_decay=1e-4,
    decay_all=True,
    schedule="step",
    warmup=0,
    smoothing=0.0,
    mixup=0.0,
    patience=15,
    epochs=90,
    batch=128,
)
NVIDIA = Recipe(
    name="nvidia",
    optimizer="sgd",
    lr=0.256,
    lr_batch=256,
    momentum=0.875,
    weight_decay=1 / 32768,
    decay_all=False,
    schedule="cosine",
    warmup=5,
    smoothing=0.1,
    mixup=0.2,
    patience=None,
    epochs=90,
    batch=256,
)
RECIPES = {recipe.name: recipe for recipe in (CIFAR, NVIDIA)}
STEP, GAMMA = 30, 0.1


def optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over the parameters that are trained, in two groups.

    The first group decays. The second holds gamma and beta of BatchNorms and every bias, and decays
    only if the recipe says so: they are few, and pulling gamma to 0 only shrinks what the next
    layer scales up again.
    """
    plain = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, _BatchNorm) or name == "bias"
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in plain], "weight_decay": recipe.weight_decay},
        {
            "params": [p for p in trained if id(p) in plain],
            "weight_decay": recipe.weight_decay if recipe.decay_all else 0.0,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)


def learning_rate(recipe: Recipe, epoch: int, epochs: int, batch: int) -> float:
    """The rate of one epoch, counted from 0.

    step: lr 0.1^floor(epoch / 30). cosine: lr (1 + cos(pi e / E)) / 2 with e and E counted without
    the warm-up, during which it is lr (epoch + 1) / warmup.
    """
    lr = recipe.lr if recipe.lr_batch is None else recipe.lr * batch / recipe.lr_batch
    if epoch < recipe.warmup:
        return lr * (epoch + 1) / recipe.warmup
    if recipe.schedule == "step":
        return lr * GAMMA ** (epoch // STEP)
    done = (epoch - recipe.warmup) / (epochs - recipe.warmup)
    return lr * (1 + math.cos(math.pi * done)) / 2


def augmented(images: Tensor, draw: np.random.Generator, *, mirror: bool, padding: int) -> Tensor:
    """Each picture cropped at a place of its own from its padded self, and mirrored or not.

    The same as torchvision's RandomCrop(size, padding) and RandomHorizontalFlip, for a whole batch
    at once: one gather.

    Args:
        images: [N, H, W, C], any dtype; padded with zeros.
        mirror: whether half of them are mirrored.
        padding: pixels on each side; 0 crops nothing.

    Returns:
        [N, H, W, C], new memory.
    """
    n, height, width, _ = images.shape
    padded = nn.functional.pad(images, (0, 0, padding, padding, padding, padding))
    corner = torch.from_numpy(draw.integers(2 * padding + 1, size=(2, n, 1)))
    rows, columns = corner[0] + torch.arange(height), corner[1] + torch.arange(width)
    if mirror:
        flipped = torch.from_numpy(draw.random(n) < 0.5)
        columns[flipped] = columns[flipped].flip(1)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Labels [N] int64 → [N, classes] fp32: 1 - s + s / classes for the label, s / classes else."""
    hot = nn.functional.one_hot(labels, classes).float()
    return hot * (1 - smoothing) + smoothing / classes


def mixed(x: Tensor, y: Tensor, draw: np.random.Generator, alpha: float) -> tuple[Tensor, Tensor]:
    """MixUp: each example and another of the batch, l x + (1 - l) x', likewise the targets.

    Args:
        x: [N, ...] fp32.
        y: [N, classes] fp32, as from `targets`.
        alpha: l is drawn from Beta(alpha, alpha), once for the batch; 0 mixes nothing.
    """
    if alpha == 0:
        return x, y
    part = float(draw.beta(alpha, alpha))
    other = torch.from_numpy(draw.permutation(len(x)))
    return part * x + (1 - part) * x[other], part * y + (1 - part) * y[other]


def cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean over the batch of -sum(wanted log softmax(logits)); both [N, classes]."""
    return -(wanted * logits.log_softmax(1)).sum(1).mean()


class EarlyStopping:
    """Remembers the weights of the lowest loss, and says when to wait no longer.

    Args:
        patience: epochs without a lower loss before it says so.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best = math.inf
        self.epoch = -1
        self._weights: dict[str, Tensor] = {}

    def update(self, epoch: int, loss: float, model: nn.Module) -> bool:
        """Takes one epoch's loss; True once training should stop."""
        if loss < self.best:
            self.best, self.epoch = loss, epoch
            self._weights = {k: v.clone() for k, v in model.state_dict().items()}
        return epoch - self.epoch >= self.patience

    def restore(self, model: nn.Module) -> None:
        """Puts the best epoch's weights back."""
        if self._weights:
            model.load_state_dict(self._weights)
