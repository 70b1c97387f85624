"""In-place operations of every operator: each name of the changed tensor means the new value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres
from fastres.errors import CaptureError
from fastres.graph.capture import capture
from fastres.options import Input

Agree = Callable[..., None]
ModelOf = Callable[..., nn.Module]
GIVEN = Input((1, 4, 6, 6))

DROPOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda y: F.dropout(y, 0.2, training=False, inplace=True),
    "dropout of maps": lambda y: F.dropout2d(y, 0.2, training=False, inplace=True),
    "alpha dropout": lambda y: F.alpha_dropout(y, 0.2, training=False, inplace=True),
    "feature alpha dropout": lambda y: F.feature_alpha_dropout(y, 0.2, False, inplace=True),
    "dropout of nothing": lambda y: F.dropout(y, 0.0, training=True, inplace=True),
}
OPERATORS: dict[str, Callable[[Tensor], Any]] = {
    "pow_": lambda y: y.pow_(2),
    "pow_ of a tensor": lambda y: y.pow_(torch.full((4, 1, 1), 1.5)),
    "ldexp_": lambda y: y.ldexp_(torch.full((4, 1, 1), 2.0)),
    "clamp_": lambda y: y.clamp_(0.3, 0.6),
    "clamp_min_": lambda y: y.clamp_min_(0.4),
    "hardtanh_": lambda y: F.hardtanh_(y, 0.3, 0.6),
    "relu6": lambda y: F.relu6(y, inplace=True),
    "elu_": lambda y: F.elu_(y - 0.5),
    "leaky_relu_": lambda y: F.leaky_relu_(y.sub_(0.5)),
    "threshold_": lambda y: F.threshold_(y, 0.5, 0.1),
    "hardswish": lambda y: F.hardswish(y, inplace=True),
    "hardsigmoid": lambda y: F.hardsigmoid(y, inplace=True),
    "mish": lambda y: F.mish(y, inplace=True),
    "div_": lambda y: y.div_(3.0),
    "floor_divide_": lambda y: y.mul_(10.0).floor_divide_(3.0),
    "exp_": lambda y: y.exp_(),
    "fill_": lambda y: y.fill_(0.25),
    "zero_": lambda y: y.zero_().add_(0.5),
    "copy_": lambda y: y.copy_(y.flip(1)),
    "masked_fill_": lambda y: y.masked_fill_(y > 0.5, 0.1),
    "index_fill_": lambda y: y.index_fill_(1, torch.tensor([2]), 0.7),
    "index_put_": lambda y: y.index_put_((torch.tensor([0]),), y.new_tensor(0.25)),
    "addcmul_": lambda y: y.addcmul_(y, y, value=0.5),
    "lerp_": lambda y: y.lerp_(y.flip(2), 0.25),
    "cumsum_": lambda y: y.cumsum_(1),
    "tril_": lambda y: y.tril_(),
    "where by a mask": lambda y: y.masked_scatter_(y > 0.5, y.flip(1)),
    "transposed in place": lambda y: y.transpose_(2, 3).mul_(2.0),
    "polar in place": lambda y: y.atan2_(y.flip(1)),
    "renorm_": lambda y: y.renorm_(2, 1, 0.5),
    "through a part": lambda y: y[:, 1:3].sigmoid_(),
    "through a diagonal": lambda y: y.diagonal(dim1=2, dim2=3).mul_(3.0),
    "through strides": lambda y: y.as_strided((y.shape[0], 4, 3), (144, 36, 1)).mul_(3.0),
}


def read_under_every_name(change: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def forward(m: Any, x: Tensor) -> Any:
        y = torch.sigmoid(m.conv(x))
        alias = y
        changed = change(y)
        return alias * 2.0, y + 1.0, changed * 1.0

    return forward


@pytest.mark.parametrize("name", OPERATORS | DROPOUTS)
def test_every_name_means_the_new_value(name: str, model_of: ModelOf, agree: Agree) -> None:
    forward = read_under_every_name((OPERATORS | DROPOUTS)[name])
    model = model_of(forward, conv=nn.Conv2d(4, 4, 3, padding=1))
    graph = capture(model, [GIVEN]).graph
    for n in (1, 2, 5):
        agree(model, graph, [torch.randn(n, 4, 6, 6)])


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_in_place_is_nothing(
    name: str, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the program rewritten for it, which takes longer than all else."""

    def forward(m: Any, x: Tensor) -> Tensor:
        seen = m.conv(x)[..., 1:]  # a view: what is written to it is written to the whole
        return m.fc(DROPOUTS[name](seen).mean((2, 3)))  # type: ignore[no-any-return]

    monkeypatch.delattr("fastres.graph.capture.functional")
    model = model_of(forward, conv=nn.Conv2d(4, 4, 3), fc=nn.Linear(4, 3))
    x = torch.randn(3, 4, 6, 6)
    with fastres.compile(model, x) as engine:
        assert [node.name for node in engine.graph] == ["conv", "slice", "mean", "fc"]
        assert torch.allclose(engine(x), model(x), atol=1e-5)


def test_dropout_in_place_that_draws_is_refused(model_of: ModelOf) -> None:
    model = model_of(lambda m, x: F.dropout(x * 2, 0.5, training=True, inplace=True))
    with pytest.raises(CaptureError, match="draws random numbers"):
        capture(model, [GIVEN])


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "polygamma_": (lambda y: y.polygamma_(1), "in place in a way that PyTorch cannot rewrite"),
    "through an unfolding": (lambda y: y.unfold(2, 2, 2).mul_(3.0), "for one size only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_other_form_is_refused(name: str, model_of: ModelOf) -> None:
    change, message = REFUSED[name]
    with pytest.raises(CaptureError, match=message):
        capture(model_of(read_under_every_name(change), conv=nn.Conv2d(4, 4, 3)), [GIVEN])
