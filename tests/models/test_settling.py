"""fastres.models.settle: random networks whose every number matters."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastres import models

PhotoBatch = Callable[[int, int], Tensor]


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.fixture
def images(photo_batch: PhotoBatch) -> Tensor:
    return photo_batch(4, 32)


def test_scales_and_shifts_are_random(images: Tensor) -> None:
    model = models.settle(models.resnet18(stem="cifar", seed=0), images)
    gamma = torch.cat([norm.weight.detach() for norm in norms(model)])
    beta = torch.cat([norm.bias.detach() for norm in norms(model)])
    assert gamma.min() >= 0.5 and gamma.max() <= 1.5
    assert gamma.mean().item() == pytest.approx(1.0, abs=0.02)
    assert beta.mean().item() == pytest.approx(0.0, abs=0.02)
    assert beta.std().item() == pytest.approx(0.25, rel=0.05)


def test_running_statistics_are_the_batch_s(images: Tensor) -> None:
    model = models.settle(models.cifar_resnet(20, seed=0), images)
    stem = model.conv1(images)
    torch.testing.assert_close(model.bn1.running_mean, stem.mean((0, 2, 3)))
    torch.testing.assert_close(model.bn1.running_var, stem.var((0, 2, 3)))
    # So in eval mode each layer puts out very nearly gamma * N(0, 1) + beta.
    seen: dict[nn.Module, Tensor] = {}
    for norm in norms(model):
        norm.register_forward_hook(lambda norm, _inputs, output: seen.update({norm: output}))
    logits(model, images)
    assert len(seen) == len(norms(model))
    for norm, output in seen.items():
        spread = output.std((0, 2, 3)) / norm.weight
        torch.testing.assert_close(output.mean((0, 2, 3)), norm.bias, atol=0.05, rtol=0)
        torch.testing.assert_close(spread, torch.ones_like(spread), atol=0.05, rtol=0)


def test_is_in_place_and_leaves_eval_mode_and_momentum(images: Tensor) -> None:
    model = models.cifar_resnet(8)
    model.bn1.momentum = None
    state = torch.random.get_rng_state()
    assert models.settle(model, images) is model
    assert not any(module.training for module in model.modules())
    assert model.bn1.momentum is None
    assert {norm.momentum for norm in norms(model.layer1)} == {0.1}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_restores_momentum_when_the_pass_fails() -> None:
    model = models.cifar_resnet(8)
    with pytest.raises(RuntimeError):
        models.settle(model, torch.zeros(2, 4, 32, 32))
    assert {norm.momentum for norm in norms(model)} == {0.1}
    assert not any(module.training for module in model.modules())


def test_same_seed_same_network(images: Tensor) -> None:
    def settled(seed: int) -> dict[str, Tensor]:
        return models.settle(models.cifar_resnet(20, seed=0), images, seed=seed).state_dict()

    first, again, other = settled(0), settled(0), settled(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["bn1.weight"], other["bn1.weight"])


def test_settling_twice_changes_nothing(images: Tensor) -> None:
    model = models.settle(models.cifar_resnet(20, seed=0), images)
    before = logits(model, images)
    assert torch.equal(logits(models.settle(model, images), images), before)


def test_dropout_stays_inert(images: Tensor) -> None:
    model = models.cifar_resnet(8, seed=0)
    plain = models.settle(models.cifar_resnet(8, seed=0), images)
    model.layer1.append(nn.Dropout(0.9))
    assert torch.equal(
        models.settle(model, images).bn1.running_var, plain.bn1.running_var
    ) and torch.equal(logits(model, images), logits(plain, images))


def test_takes_models_that_return_dicts(images: Tensor) -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = models.cifar_resnet(8)

        def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
            return {"maps": [self.body.conv1(x), self.body(x) * self.scale]}

        scale = 1.0

    model = Pyramid()
    models.settle(model, images)
    model.scale = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        models.settle(model, images)


@pytest.mark.parametrize("factory", [models.cifar_resnet, models.preact_resnet])
def test_1202_layers_stay_finite(factory: Callable[..., nn.Module], images: Tensor) -> None:
    y = logits(models.settle(factory(1202, seed=0), images), images)
    assert torch.isfinite(y).all()
    assert y.abs().max() < 1e3


@pytest.mark.parametrize(
    "factory",
    [
        lambda: models.resnet18(seed=0),
        lambda: models.resnet50(seed=0, version="v1"),
        lambda: models.cifar_resnet(20, seed=0),
        lambda: models.preact_resnet(20, seed=0),
    ],
    ids=["resnet18", "resnet50-v1", "cifar20", "preact20"],
)
@pytest.mark.parametrize("term", ["running_mean", "running_var", "weight", "bias"])
def test_every_batchnorm_term_matters(
    factory: Callable[[], nn.Module], term: str, photo_batch: PhotoBatch
) -> None:
    x = photo_batch(4, 64)
    model = models.settle(factory(), x)
    before = logits(model, x)
    neutral = 1.0 if term in ("running_var", "weight") else 0.0
    for norm in norms(model):
        getattr(norm, term).data.fill_(neutral)
    assert (logits(model, x) - before).norm() > 0.1 * before.norm()


def test_logits_depend_on_the_picture(photos: Tensor) -> None:
    y = logits(models.settle(models.resnet50(seed=0), photos), photos)
    assert (y - y.mean(0)).norm() > 0.1 * y.norm()


def test_refuses_pictures_that_are_not_finite(images: Tensor) -> None:
    with pytest.raises(ValueError, match="not finite"):
        models.settle(models.cifar_resnet(8), images / 0)


def test_refuses_one_value_per_channel(images: Tensor) -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        models.settle(models.resnet18(), images[:1])
