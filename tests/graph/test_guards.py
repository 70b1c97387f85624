"""Branches on sizes: kept where every promised size takes them, refused where one does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from fastres.errors import CaptureError
from fastres.graph.capture import capture
from fastres.graph.export import inputs_of_program
from fastres.options import Input

ModelOf = Callable[..., nn.Module]
FIXED = Input((1, 3, 8, 8))
RANGED = Input(((1, 3, 6, 6), (1, 3, 8, 10), (4, 3, 40, 40)))
WIDE = Input(((1, 3, 8, 8), (1, 3, 64, 64), (4, 3, 4000, 4000)))

REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], Input, str]] = {
    "large batches": (
        lambda m, x: x * 2 if x.shape[0] > 4 else x * 3,
        FIXED,
        r"followed where .*shape\[0\] <= 4, as .*test_guards.*; for .*\.shape\[0\] = 5 it does",
    ),
    "a batch of one": (lambda m, x: x * 2 if x.shape[0] == 1 else x * 3, FIXED, "= 1 it does"),
    "one batch of many": (lambda m, x: x * 2 if x.shape[0] == 777 else x * 3, FIXED, "= 777 it"),
    "batches of eight": (lambda m, x: x * 2 if x.shape[0] % 8 else x * 3, FIXED, "= 8 it"),
    "even heights": (lambda m, x: x * 2 if x.shape[2] % 2 else x * 3, RANGED, "= 7 it"),
    "tall pictures": (lambda m, x: x * 2 if x.shape[2] > 39 else x * 3, RANGED, "= 40 it"),
    "one height of many": (lambda m, x: x * 2 if x.shape[2] == 3333 else x * 3, WIDE, "= 3333 it"),
    "square pictures": (
        lambda m, x: x * 2 if x.shape[2] == x.shape[3] else x * 3,
        RANGED,
        "; for .* and .* it does",
    ),
    "batches as tall as pictures": (
        lambda m, x: x * 2 if x.shape[0] == x.shape[2] else x * 3,
        RANGED,
        "; for .* it does",
    ),
    "pictures as many as tall": (
        lambda m, x: x + x.transpose(0, 2)[:, :3],
        Input(((1, 3, 1, 8), (1, 3, 2, 8), (1, 3, 9, 8))),
        "where H or W is the batch size",
    ),
    "a size within": (
        lambda m, x: x * 2 if x[:, :, ::2].shape[2] > 15 else x * 3,
        RANGED,
        "= 31 it",
    ),
    "squeeze": (lambda m, x: x.mean((2, 3), keepdim=True).squeeze(), FIXED, "drop the batch"),
    "squeeze of the batch": (lambda m, x: (x * 2).squeeze(0), FIXED, "drop the batch"),
    "squeeze of some": (lambda m, x: x[:, :1].squeeze((0, 1)), FIXED, "drop the batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_branch_that_some_sizes_do_not_take_is_refused(name: str, model_of: ModelOf) -> None:
    forward, given, message = REFUSED[name]
    with pytest.raises(CaptureError, match=message):
        capture(model_of(forward), [given])


KEPT: dict[str, tuple[Callable[[Any, Tensor], Any], Input]] = {
    "a check of the channels": (lambda m, x: x * 2 if x.shape[1] == 3 else x, RANGED),
    "a fixed height": (lambda m, x: x * 2 if x.shape[2] == 8 else x, FIXED),
    "no batch is empty": (lambda m, x: x * 2 if x.shape[0] > 0 else x, RANGED),
    "heights in range": (lambda m, x: x * 2 if 6 <= x.shape[2] <= 40 else x, RANGED),
    "a size that is always even": (lambda m, x: x * 2 if 2 * x.shape[2] % 2 == 0 else x, WIDE),
    "squeeze of ones": (
        lambda m, x: x.mean((2, 3), keepdim=True).squeeze(-1).squeeze((2,)),
        RANGED,
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_branch_that_every_size_takes_is_kept(
    name: str, model_of: ModelOf, agree: Callable[..., None]
) -> None:
    forward, given = KEPT[name]
    model = model_of(forward)
    graph = capture(model, [given]).graph
    for shape in {given.smallest, given.usual, (5, *given.usual[1:])}:
        agree(model, graph, [torch.randn(shape)])


def programs(
    model_of: ModelOf, batch: Any, height: Any = Dim.STATIC
) -> torch.export.ExportedProgram:
    model = model_of(lambda m, x: x * 2)
    sizes = (({0: batch, 2: height},),)
    return torch.export.export(model, (torch.zeros(4, 3, 8, 8),), dynamic_shapes=sizes)


def test_a_program_brings_the_ranges_it_was_exported_for(model_of: ModelOf) -> None:
    (found,) = inputs_of_program(programs(model_of, Dim.AUTO))
    assert found.smallest[1:] == found.largest[1:] == (3, 8, 8)
    (found,) = inputs_of_program(programs(model_of, Dim("n", min=1, max=64), Dim("h", max=32)))
    assert found.largest == (64, 3, 32, 8)
    assert found.usual == (1, 3, 32, 8)  # as near to 224 as it may be
    (found,) = inputs_of_program(programs(model_of, Dim.STATIC))
    assert found.smallest == found.largest == (4, 3, 8, 8)


def test_a_program_for_large_batches_alone_is_refused(model_of: ModelOf) -> None:
    with pytest.raises(CaptureError, match="takes batches of at least 3 in"):
        inputs_of_program(programs(model_of, Dim("n", min=3, max=64)))
