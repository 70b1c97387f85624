"""The section `families`: one launch of every kernel family, held against float64.

The first question to a GPU that has not run these kernels: each is launched alone, waited for, and
checked over poisoned outputs. Nothing is timed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bench.gpu.answers import answer
from bench.gpu.run import Row, Run
from bench.kernels.cases import KernelCase, ProductCase, cases, name_of
from bench.kernels.posed import Posed
from fastres.backends.triton.planning.overlap import has_dependent_launch
from fastres.backends.triton.planning.table import Tiles
from fastres.backends.triton.tuning.choosing import tiles_for
from fastres.kernels.launch import Launch
from fastres.options import Options

BATCH = 1  # of pictures, where a family has such a case: operands are laid out in no time


def families(run: Run) -> Iterator[Row]:
    """One case of each family and kind of number; then each again as a dependent launch."""
    tiles = tiles_for(Options(cache_dir=str(run.out)), run.device)
    on_gpu = run.device.type == "cuda"
    for dependent in (False, True) if on_gpu and has_dependent_launch(tiles.target) else (False,):
        for case in one_of_each():
            if not on_gpu:
                case = case.small()
            name = f"{name_of(case)}{', dependent' if dependent else ''}"
            if (yield {"name": name, "asked": True}):
                continue
            why = case.refusal(tiles.target)
            if case.precision == "fp8" and not on_gpu:
                why = "Triton's interpreter does not round to fp8"
            if why is not None:
                yield {"name": name, "refused": why}
                continue
            work = partial(_checked, case, tiles, run.device, dependent)
            yield from answer(name, run.device, work)


def one_of_each() -> list[KernelCase]:
    """Of each family and kind of number the smallest; of convolutions each kind of window, too."""
    found: dict[tuple[str, ...], KernelCase] = {}
    for case in sorted(cases(), key=lambda case: case.batch):
        found.setdefault((case.family, case.precision, *_window(case)), case)
    return list(found.values())


def _window(case: KernelCase) -> Sequence[str]:
    """What tells convolutions apart: taps, strides and what is added, in fp16 and int8."""
    if not isinstance(case, ProductCase) or case.family not in ("conv2d", "boxes"):
        return ()
    if case.precision not in ("fp16", "int8"):
        return ()
    problem: Any = case.problem
    shape = problem.shape
    return (f"{shape.r}x{shape.s}", str(shape.stride), str(shape.dilation), str(problem.residual))


def _checked(case: KernelCase, tiles: Tiles, device: torch.device, dependent: bool) -> Row:
    posed: Posed = case.pose(tiles, device)
    for call in posed.calls:
        if dependent and isinstance(call, Launch) and "DEPENDENT" in call.constants:
            call = call.overlapping()
        call.run()
    why = posed.wrong()
    row: Row = {"right": why is None, "tiles": posed.tiles}
    return row if why is None else row | {"why": why}
