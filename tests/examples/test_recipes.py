"""examples/recipes.py against PyTorch's own schedules and losses, and against plain loops."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import network
from recipes import (
    CIFAR,
    NVIDIA,
    EarlyStopping,
    augmented,
    cross_entropy,
    learning_rate,
    mixed,
    optimiser,
    targets,
)
from torch import nn


@pytest.mark.parametrize("name", ["resnet20", "bottleneck", "fastres:preact_resnet8"])
def test_only_weights_of_convolutions_and_head_decay(name: str) -> None:
    model = network(name)
    steps = optimiser(model, NVIDIA)
    decay = {id(p): group["weight_decay"] for group in steps.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        weight = parameter.ndim > 1  # gamma, beta and biases are vectors
        assert decay[id(parameter)] == (1 / 32768 if weight else 0), key
    assert all(group["momentum"] == 0.875 for group in steps.param_groups)


def test_the_cifar_recipe_decays_all_and_adam_is_adam() -> None:
    model = network("resnet20")
    assert {g["weight_decay"] for g in optimiser(model, CIFAR).param_groups} == {1e-4}
    adam = optimiser(model, replace(CIFAR, optimizer="adam"))
    assert isinstance(adam, torch.optim.Adam)


def test_step_schedule_is_pytorchs() -> None:
    steps = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=CIFAR.lr)
    theirs = torch.optim.lr_scheduler.StepLR(steps, step_size=30, gamma=0.1)
    for epoch in range(90):
        assert learning_rate(CIFAR, epoch, 90, 64) == pytest.approx(theirs.get_last_lr()[0])
        with warnings.catch_warnings():  # it wants a step of the optimiser first
            warnings.simplefilter("ignore")
            theirs.step()


@pytest.mark.parametrize(
    ("epoch", "share"),
    [
        (0, 1 / 5),
        (3, 4 / 5),
        (4, 1),
        (5, 1),
        (15, (1 + math.cos(math.pi / 4)) / 2),
        (25, 0.5),
        (44, (1 + math.cos(math.pi * 39 / 40)) / 2),
    ],
)
def test_cosine_schedule_with_warm_up(epoch: int, share: float) -> None:
    assert learning_rate(NVIDIA, epoch, 45, 256) == pytest.approx(0.256 * share)
    assert learning_rate(NVIDIA, epoch, 45, 64) == pytest.approx(0.064 * share)


def test_label_smoothing_is_pytorchs() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(16, 10), torch.randint(10, (16,))
    for smoothing in (0.0, 0.1):
        theirs = nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, labels)
        ours = cross_entropy(logits, targets(labels, 10, smoothing))
        torch.testing.assert_close(ours, theirs)


def test_mixup() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(6, 2, 3), torch.arange(6) % 4
    y = targets(labels, 4, 0.1)
    mixed_x, mixed_y = mixed(x, y, np.random.default_rng(5), 0.2)
    draw = np.random.default_rng(5)
    part, other = draw.beta(0.2, 0.2), draw.permutation(6)
    assert 0.001 < part < 0.999 and (other != np.arange(6)).any()  # or this would test nothing
    for i, j in enumerate(other):
        expected = part * x[i].double() + (1 - part) * x[j].double()
        torch.testing.assert_close(mixed_x[i].double(), expected, rtol=1e-6, atol=1e-6)
        wanted = np.full(4, 0.025)
        wanted[labels[i]] += 0.9 * part
        wanted[labels[j]] += 0.9 * (1 - part)
        np.testing.assert_allclose(mixed_y[i].numpy(), wanted, rtol=1e-5)
    assert mixed(x, y, draw, 0)[0] is x


@pytest.mark.parametrize("mirror", [False, True])
def test_every_crop_is_one_of_the_padded_picture(mirror: bool) -> None:
    images = torch.arange(1, 40 * 6 * 7 * 3 + 1).view(40, 6, 7, 3)
    found = augmented(images, np.random.default_rng(0), mirror=mirror, padding=2)
    places = set()
    for picture, crop in zip(images, found, strict=True):
        padded = np.pad(picture.numpy(), ((2, 2), (2, 2), (0, 0)))
        candidates = {
            (top, left, flip): padded[top : top + 6, left : left + 7][:, :: -1 if flip else 1]
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
        }
        places |= {key for key, value in candidates.items() if np.array_equal(value, crop)}
    assert len(places) > 15  # of 25, or of 50
    assert {flip for _, _, flip in places} == ({False, True} if mirror else {False})
    assert {top for top, _, _ in places} == {left for _, left, _ in places} == set(range(5))


def test_nothing_to_augment() -> None:
    images = torch.arange(2 * 4 * 4 * 3).view(2, 4, 4, 3)
    same = augmented(images, np.random.default_rng(0), mirror=False, padding=0)
    assert torch.equal(same, images)


def test_early_stopping_goes_back_to_the_best_epoch() -> None:
    model, stopping = nn.Linear(1, 1), EarlyStopping(patience=2)
    stopped = None
    for epoch, loss in enumerate([3.0, 1.0, 2.0, 0.5, 0.5, 0.6, 0.1]):
        nn.init.constant_(model.weight, epoch)
        if stopping.update(epoch, loss, model):
            stopped = epoch
            break
    stopping.restore(model)
    assert stopped == 5 and stopping.epoch == 3 and model.weight.item() == 3
