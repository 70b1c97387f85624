"""fastres.graph.branches: a guard that fails is settled by a second export, or refused by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres.graph.capture as capturing
from fastres.errors import CaptureError
from fastres.graph.capture import capture
from fastres.options import Input

Agree = Callable[..., None]
ModelOf = Callable[..., nn.Module]
Forward = Callable[[Any, Tensor], Any]
LAST = torch.channels_last
MAPS = Input(((1, 16, 16, 16), (1, 16, 16, 20), (2, 16, 24, 24)))
SQUARE = Input(((1, 3, 6, 6), (1, 3, 8, 8), (4, 3, 40, 40)))
FIXED = Input((1, 3, 8, 8))
RANGED = Input(((1, 3, 6, 6), (1, 3, 8, 10), (4, 3, 40, 40)))


def nested(m: Any, x: Tensor) -> Tensor:
    """Both outer branches do the same, but for some sizes beyond."""
    if x.shape[0] > 4 and x.shape[0] > 100:
        return x * 2
    return x * 3


def only_together(m: Any, x: Tensor) -> Tensor:
    if x.shape[0] > 4:
        return x * 2 if x.shape[2] > 30 else x * 3
    return x * 3


def written_through_an_index(m: Any, x: Tensor) -> Tensor:
    y = x * 1.0
    y[:, [0, 1]] = y[:, [1, 2]]
    y[:, [0, 2]] *= 2.0
    return y


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes of every export; None for the usual ones."""
    seen: list[Any] = []

    def counted(model: Any, inputs: Any, shapes: Any = None) -> Any:
        seen.append(shapes)
        return export(model, inputs, shapes)

    export = capturing.export
    monkeypatch.setattr(capturing, "export", counted)
    return seen


SETTLED: dict[str, tuple[Forward, Input]] = {
    "channels_last in forward": (lambda m, x: m.wide(x.contiguous(memory_format=LAST)), MAPS),
    "channels_last in between": (
        lambda m, x: m.wide(m.wide(x).to(memory_format=LAST)).mean((2, 3)),
        MAPS,
    ),
    "a copy in channels_last": (lambda m, x: m.wide(x.clone(memory_format=LAST)), MAPS),
    "the same on both sides": (lambda m, x: x * 3 if x.shape[0] > 4 else x * 3, FIXED),
    "the same for every height": (lambda m, x: x.relu() if x.shape[2] % 2 else x.relu(), RANGED),
    "another way to say it": (
        lambda m, x: x.flatten(1) if x.shape[0] == 1 else x.reshape(x.shape[0], -1),
        FIXED,
    ),
    "a number for a size": (
        lambda m, x: x.view(1, 192) * 2 if x.shape[0] == 1 else x.flatten(1) * 2,
        FIXED,
    ),
    "written through an index": (written_through_an_index, FIXED),
    "layers of attention": (
        lambda m, x: m.attention(m.wide(x).flatten(2).transpose(1, 2)),
        Input((1, 16, 8, 8)),
    ),
    "a number for one of three sizes": (
        lambda m, x: (
            torch.cdist(x.mean((2, 3)), m.rows),
            F.cosine_similarity(x.mean((2, 3))[:, None], m.rows[None], dim=-1),
        ),
        RANGED,
    ),
    "square or not": (lambda m, x: x * 2 if x.shape[2] == x.shape[3] else x * 2, SQUARE),
    "both sides together": (
        lambda m, x: x * 2 if x.shape[2] < 3 * x.shape[3] else x * 2,
        RANGED,
    ),
}


@pytest.mark.parametrize("name", SETTLED)
def test_equal_graphs_settle_it(
    name: str, model_of: ModelOf, agree: Agree, exports: list[Any]
) -> None:
    forward, given = SETTLED[name]
    wide = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1, 2))
    layer = nn.TransformerEncoderLayer(16, 2, 8, batch_first=True)
    attention = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = model_of(forward, wide=wide, attention=attention, rows=torch.randn(5, 3))
    graph = capture(model, [given]).graph
    assert len(exports) > 1  # else nothing was settled
    for shape in {given.smallest, given.usual, (5, *given.largest[1:])}:
        agree(model, graph, [torch.randn(shape)])


REFUSED: dict[str, tuple[Forward, Input, str]] = {
    "nested": (nested, FIXED, "for .*= 101 it does something else.*Where the example has"),
    "two sizes together": (only_together, RANGED, "= 31"),
    "something that does not run": (
        lambda m, x: F.pad(x, (-8, 0)) if x.shape[3] < 8 else x * 2,
        Input(((1, 3, 6, 6), (1, 3, 10, 10), (1, 3, 12, 12))),
        "for .* = 6 it does",
    ),
    "square pictures alone": (
        lambda m, x: x * 2 if x.shape[2] == x.shape[3] else x * 3,
        SQUARE,
        "for .* and .* it does something else",
    ),
    "an assertion": (lambda m, x: checked(x), RANGED, "it does not run"),
    "many branches": (
        lambda m, x: x * sum(x.shape[2] > n for n in range(20, 40)),
        RANGED,
        "something else",
    ),
}


def checked(x: Tensor) -> Tensor:
    assert x.shape[2] < 30, "too tall"
    return x * 2


@pytest.mark.parametrize("name", REFUSED)
def test_other_graphs_are_refused(name: str, model_of: ModelOf) -> None:
    forward, given, message = REFUSED[name]
    with pytest.raises(CaptureError, match=message):
        capture(model_of(forward), [given])


def test_the_refusal_shows_both(model_of: ModelOf) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return x.sigmoid() if x.shape[0] > 4 else x.relu()

    message = r"Where the example has `.*activation\(.*kind=relu\)`, it has `.*kind=sigmoid\)`"
    with pytest.raises(CaptureError, match=message):
        capture(model_of(forward), [FIXED])


def test_as_many_exports_as_it_takes(model_of: ModelOf, exports: list[Any]) -> None:
    """Branches without end end in a refusal."""

    def forward(m: Any, x: Tensor) -> Tensor:
        for n in range(9, 39):
            if x.shape[2] > n:
                x = x * 1.0
            else:
                x = x * 1.0
        return x

    with pytest.raises(CaptureError, match="something else or does not run"):
        capture(model_of(forward), [RANGED])
    assert len(exports) < 12


def test_a_network_without_branches_is_exported_once(model_of: ModelOf, exports: list[Any]) -> None:
    model = model_of(
        lambda m, x: F.max_pool2d(m.norm(m.conv(x)), 3, 2).mean((2, 3)),
        conv=nn.Conv2d(3, 8, 3),
        norm=nn.BatchNorm2d(8),
    )
    capture(model, [Input(((1, 3, 32, 32), (2, 3, 64, 64), (4, 3, 96, 96)))])
    assert exports == [None]


def test_what_has_a_number_for_a_size_is_the_same(model_of: ModelOf, agree: Agree) -> None:
    """Broadcasting asks whether the batch is one, where it then stands as a number."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.table.expand(x.shape[0], -1, -1, -1) * x
        return y + m.table[:, :, :1].expand(y.shape[0], -1, y.shape[2], -1)

    for given in (FIXED, RANGED):
        shape = (1, 3, *given.usual[2:]) if given is FIXED else (1, 3, 1, 1)
        model = model_of(forward, table=torch.rand(shape))
        graph = capture(model, [given]).graph
        for n in (1, 2, 5):
            agree(model, graph, [torch.randn(n, *given.usual[1:])])


def test_a_model_for_square_pictures(model_of: ModelOf, agree: Agree) -> None:
    """It does not run on others, so its engine takes no others."""
    model = model_of(lambda m, x: x + x.transpose(2, 3))
    graph = capture(model, [SQUARE]).graph
    assert graph.inputs[0].spec.shape[2] == graph.inputs[0].spec.shape[3]
    agree(model, graph, [torch.randn(3, 3, 11, 11)])


def test_sizes_that_a_model_compares_stay_two(model_of: ModelOf, agree: Agree) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return x.relu() if x.shape[2] != x.shape[3] else x.relu()

    model = model_of(forward)
    graph = capture(model, [SQUARE]).graph
    for height, width in ((8, 8), (9, 7), (40, 6)):
        agree(model, graph, [torch.randn(2, 3, height, width)])


def test_inputs_that_share_a_batch(model_of: ModelOf, agree: Agree) -> None:
    """Two inputs whose batch is one size: both follow where a guard on it fails."""

    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        z = x + y
        return z.relu() if z.shape[0] > 4 else z.relu()

    graph = capture(model_of(forward), [FIXED, FIXED]).graph
    for n in (1, 3, 5, 9):
        agree(model_of(forward), graph, [torch.randn(n, 3, 8, 8), torch.randn(n, 3, 8, 8)])
    with pytest.raises(CaptureError, match="for .* = 5 it does something else"):
        capture(model_of(lambda m, x, y: x + y if x.shape[0] > 4 else x - y), [FIXED, FIXED])
