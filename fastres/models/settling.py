"""Making an untrained network numerically meaningful, so that a parity test on it can fail."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Wider betas drown the picture: at 0.25 a settled ResNet-50's logits differ between photographs by
# 27 % of their norm, at 1.0 by 10 %. Narrower ones would make a dropped beta hard to see.
_BETA_STD = 0.25

_Model = TypeVar("_Model", bound=nn.Module)


def settle(model: _Model, images: Tensor, *, seed: int = 0) -> _Model:
    """Give a fresh network BatchNorms whose every term matters, in place, and set it to eval.

    A fresh BatchNorm has mean 0 and beta 0, so an engine that dropped them would still agree.
    Here gamma ~ U[0.5, 1.5], beta ~ N(0, 0.25^2), and the running mean and variance become those
    of one training-mode pass over ``images``. Dropout and its kin stay inert.

    Args:
        model: a network with BatchNorm layers.
        images: [N, 3, H, W], real pictures in the model's dtype and on its device.
        seed: seed of gamma and beta: equal on every device.

    Returns:
        The same model, in eval mode.

    Raises:
        ValueError: an output is not finite, or a BatchNorm sees one value per channel only.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    with torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = 1.0  # the running statistics become this batch's own
            norm.train()
            if norm.affine:
                drawn = torch.empty(norm.num_features, dtype=torch.float32, device="cpu")
                norm.weight.copy_(drawn.uniform_(0.5, 1.5, generator=generator))
                norm.bias.copy_(drawn.normal_(0, _BETA_STD, generator=generator))
        try:
            model(images)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            model.eval()
        outputs = list(_tensors(model(images)))
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise ValueError(
            "the settled network's outputs are not finite; "
            "check images and weights for NaN or Inf, or settle in a wider dtype"
        )
    return model


def _tensors(output: object) -> Iterator[Tensor]:
    """Yield the tensors of a model's output, also from dicts and sequences of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | Sequence):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)
