"""fastres.graph.batching: which networks may be run on a batch in parts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastres
from fastres.errors import InputError
from fastres.graph.batching import why_not_split
from fastres.graph.capture import capture
from fastres.graph.ir import Aten
from fastres.options import Input

ModelOf = Callable[..., nn.Module]
Forward = Callable[..., Any]
SMALL = Input((1, 3, 4, 4))


def reason(model_of: ModelOf, forward: Forward, *inputs: Input) -> str | None:
    given = inputs or (SMALL,)
    model = model_of(forward, conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 2), n=torch.ones(3, 1, 1))
    return why_not_split(capture(model, given).graph, [i.usual for i in given])


SEPARATE: dict[str, Forward] = {
    "layers": lambda m, x: m.fc(F.relu(m.conv(x)).mean((2, 3))),
    "softmax": lambda m, x: m.conv(x).flatten(1).softmax(1),
    "constants": lambda m, x: x * m.n + m.n,
    "a roll of channels": lambda m, x: x.roll(1, 1),
    "upsampling": lambda m, x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "group norm": lambda m, x: F.group_norm(x, 3),
    "group norm of core ATen": lambda m, x: torch.native_group_norm(
        x, None, None, x.shape[0], 3, 16, 3, 1e-5
    )[0],
    "a shuffle": lambda m, x: x.view(x.shape[0], 3, 2, 8).transpose(1, 2).reshape(x.shape[0], -1),
    "largest per image": lambda m, x: x / x.flatten(1).amax(1)[:, None, None, None],
    "numbers": lambda m, x: x + torch.arange(4),
}
MIXED: dict[str, tuple[Forward, str]] = {
    "softmax": (lambda m, x: x.softmax(0), "softmax.* mixes the images"),
    "softmax from the end": (lambda m, x: x.softmax(-4), "softmax.* mixes the images"),
    "mean": (lambda m, x: x.mean(0), "does not begin with the batch"),
    "mean kept": (lambda m, x: x - x.mean(0, keepdim=True), "does not begin with the batch"),
    "flip": (lambda m, x: x.flip(0), "flip.* mixes the images"),
    "roll": (lambda m, x: x.roll(1, 0), "roll.* mixes the images"),
    "running sum": (lambda m, x: x.cumsum(0), "cumsum.* mixes the images"),
    "all but one": (lambda m, x: x[1:], "does not begin with the batch"),
    "its size in a number": (lambda m, x: x * (x.shape[0] // 4), "mul.* mixes the images"),
    "a roll by three": (lambda m, x: x.roll(3, 0), "roll.* mixes the images"),
    "norms when large": (lambda m, x: torch.renorm(x.flatten(1), 2, 1, 50.0), "renorm.* mixes"),
    "transposed": (lambda m, x: x.transpose(0, 1), "does not begin with the batch"),
    "largest of all": (lambda m, x: x / x.amax(), "does not begin with the batch"),
    "centred": (lambda m, x: (x.flatten(1) @ x.flatten(1).T).relu(), ".*"),
    "added across": (lambda m, x: x.flatten(1) + 0 * x.sum((1, 2, 3))[None, :1], ".*"),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_images_by_themselves(name: str, model_of: ModelOf) -> None:
    assert reason(model_of, SEPARATE[name]) is None


def test_a_call_that_only_some_sizes_fit(model_of: ModelOf) -> None:
    graph = capture(model_of(lambda m, x: x.roll(1, 1).roll(1, 2)), [SMALL]).graph
    first, second = graph.nodes
    assert isinstance(first.op, Aten)
    summed = msgspec.structs.replace(
        first.op, overload="aten.cumsum.default", args='[{"input": 0}, {"size": [0, 0, 0, 1]}]'
    )
    odd = replace(graph, nodes=(msgspec.structs.replace(first, op=summed), second))
    for tried, why in ((True, "not take a batch of every size: roll"), (False, "roll mixes")):
        found = why_not_split(odd, [SMALL.usual], tried)
        assert found is not None and why in found


@pytest.mark.parametrize("name", MIXED)
def test_images_that_meet(name: str, model_of: ModelOf) -> None:
    forward, message = MIXED[name]
    found = reason(model_of, forward)
    assert found is not None
    assert re.search(message, found), found


def test_a_batch_that_may_not_be_split_is_refused_at_once(model_of: ModelOf) -> None:
    model = model_of(lambda m, x: x.softmax(0))
    example = torch.randn(2, 3, 4, 4)
    with pytest.raises(InputError, match="softmax mixes the images .* pass oversize='error'"):
        fastres.compile(model, example, backend="reference", max_batch_size=4)
    with fastres.compile(
        model, example, backend="reference", max_batch_size=4, oversize="error"
    ) as engine:
        torch.testing.assert_close(engine(example), model(example))
        with pytest.raises(InputError, match="the batch is 5"):
            engine(torch.randn(5, 3, 4, 4))


def test_a_program_with_a_limit_is_run_in_parts(model_of: ModelOf) -> None:
    model = model_of(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 4, 3))
    sizes = (({0: torch.export.Dim("n", min=1, max=4)},),)
    program = torch.export.export(model, (torch.zeros(2, 3, 4, 4),), dynamic_shapes=sizes)
    x = torch.randn(9, 3, 4, 4)
    with fastres.compile(program, backend="reference") as engine:
        assert engine.options.max_batch_size == 4
        torch.testing.assert_close(engine(x), model(x))
    with fastres.compile(program, backend="reference", max_batch_size=2) as engine:
        assert engine.options.max_batch_size == 2


def test_a_fixed_batch_cannot_be_split(model_of: ModelOf) -> None:
    model = model_of(lambda m, x: x * 2)
    program = torch.export.export(model, (torch.zeros(2, 3, 4, 4),))
    with pytest.raises(InputError, match="the model takes a batch of 2, so a batch above"):
        fastres.compile(program, backend="reference", max_batch_size=1)
