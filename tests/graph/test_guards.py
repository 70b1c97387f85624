"""Branches on sizes: kept where every promised size takes them, refused where one does not."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fastres
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
    "one number of values": (
        lambda m, x: x * 2 if x.numel() == 192 * 700 else x * 3,
        FIXED,
        r"\.shape\[0\] = 700 it",
    ),
    "a square": (lambda m, x: x * 2 if x.shape[0] ** 2 == 600**2 else x * 3, FIXED, "= 600 it"),
    "huge batches": (lambda m, x: x * 2 if x.shape[0] > 100_000 else x * 3, FIXED, "= 100001 it"),
    "one sum of sides": (
        lambda m, x: x * 2 if x.shape[2] + x.shape[3] == 333 else x * 3,
        WIDE,
        "; for .* and .* it does",
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


def test_a_program_is_held_to_its_guards(model_of: ModelOf, tmp_path: Path) -> None:
    batch = (({0: Dim.AUTO},),)
    model = model_of(lambda m, x: x * 2 if x.shape[0] == 5 else x * 3)
    program = torch.export.export(model, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=batch)
    with pytest.raises(CaptureError, match="= 5 it does something else"):
        inputs_of_program(program)
    torch.export.save(program, tmp_path / "program.pt2")
    with pytest.raises(CaptureError, match="one that comes from a file does not show how"):
        inputs_of_program(torch.export.load(tmp_path / "program.pt2"))


def test_a_program_with_a_largest_batch(model_of: ModelOf) -> None:
    batch = (({0: Dim.AUTO},),)
    model = model_of(lambda m, x: x * 2 if x.shape[0] > 64 else x * 3)
    program = torch.export.export(model, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=batch)
    (found,) = inputs_of_program(program)
    assert found.smallest[0] <= found.usual[0] <= 2 and found.largest == (64, 3, 8, 8)
    x = torch.rand(150, 3, 8, 8)
    with fastres.compile(program, backend="reference") as engine:
        assert torch.equal(engine(x), x * 3)  # in parts


def test_a_program_whose_operators_want_more_than_a_pixel(model_of: ModelOf) -> None:
    sizes = (({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},),)
    model = model_of(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 4, 3, stride=4, padding=1))
    program = torch.export.export(model, (torch.zeros(2, 3, 32, 36),), dynamic_shapes=sizes)
    (found,) = inputs_of_program(program)
    assert found.smallest[2] in (2, 5) and found.smallest[3] in (2, 5)  # 5 where 4 gives one pixel


PROGRAMS: dict[str, tuple[Callable[[ModelOf], torch.export.ExportedProgram], str]] = {
    "keywords": (
        lambda model_of: torch.export.export(Keywords(), (), {"b": ONES, "a": ONES}),
        "several keyword arguments, which have no order",
    ),
    "a number": (
        lambda model_of: torch.export.export(model_of(lambda m, x, k: x * k), (ONES, 3.0)),
        "is no tensor; only tensors are fed",
    ),
    "a scalar tensor": (
        lambda model_of: torch.export.export(model_of(lambda m, x: x * 2), (torch.tensor(1.0),)),
        "an input has a batch of something",
    ),
}
ONES = torch.ones(2, 3, 4, 4)


class Keywords(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - 2 * b


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_do_not_take_tensors_by_place(name: str, model_of: ModelOf) -> None:
    make, message = PROGRAMS[name]
    with pytest.raises(CaptureError, match=message):
        inputs_of_program(make(model_of))


def test_a_place_in_the_model_is_named_with_its_whole_path(tmp_path: Path) -> None:
    """PyTorch cuts it: "/tmp/model.py" becomes "mp/model.py"."""
    path = tmp_path / "deciding_model.py"
    path.write_text("def forward(m, x):\n    return x * 2 if x.shape[0] > 4 else x\n")
    spec = spec_from_file_location("deciding_model", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["deciding_model"] = module
    try:
        spec.loader.exec_module(module)
        model = nn.Conv2d(3, 4, 1).eval()
        model.forward = functools.partial(module.forward, model)  # type: ignore[method-assign]
        with pytest.raises(CaptureError, match=re.escape(f"({path}:2 in forward)")):
            capture(model, [Input((1, 3, 8, 8))])
    finally:
        del sys.modules["deciding_model"]
