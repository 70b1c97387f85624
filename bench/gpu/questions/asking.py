"""First questions about the hardware: what L2, the tensor cores and the launches give.

The section `questions`; docs/gpu-notes.md says what hangs on each answer. A case runs
over poisoned outputs and is checked against PyTorch in float64 before it is timed, and after.
Passes walk through sets of operands that are larger than L2 together, but for the question about
L2 itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bench.gpu.answers import answer
from bench.gpu.questions.case import Case
from bench.gpu.questions.gemm import layouts, peaks
from bench.gpu.questions.system import chains, launches, loads
from bench.gpu.run import Row, Run
from bench.kernels.posed import compiled
from bench.kernels.rotation import in_turn, one_pass, rotation
from fastres.backends.triton.planning.table import Tiles
from fastres.backends.triton.running.timing import milliseconds
from fastres.backends.triton.tuning.choosing import tiles_for
from fastres.kernels.cost import Target
from fastres.options import Options

_SETS = 8  # of operands at most


def cases(tiles: Tiles, small: bool = False) -> list[Case]:
    """Every case, the quick questions first.

    Args:
        tiles: the target, and the tiles of the chain and of its three parts.
        small: sizes for Triton's interpreter; names stay as they are.
    """
    found = (loads(tiles, small), launches(small), peaks(small), chains(tiles, small))
    return [*itertools.chain(*found, layouts(small))]


def questions(run: Run) -> Iterator[Row]:
    """Every case: its time, or why it has none; then the fastest of each group."""
    tiles = tiles_for(Options(cache_dir=str(run.out)), run.device)
    for case in cases(tiles, small=run.device.type != "cuda"):
        if run.groups and not case.name.startswith(tuple(run.groups)):
            continue
        if (yield {"name": case.name, "asked": True}):
            continue
        work = partial(_answer, case, run.device)
        yield from answer(case.name, run.device, work, group=case.group)
    kept = [row for row in run.rows("questions") if "group" in row]
    yield {"name": f"the fastest of {len(kept)} cases", "table": "\n" + _table(kept)}


def precompile(name: str, target: Target) -> int:
    """Compiles one case's kernels into Triton's cache; needs no GPU.

    Returns:
        How many kernels compiled; of those that do not, the case itself will say why.
    """
    case = next(case for case in cases(Tiles(target)) if case.name == name)
    return compiled(case.pose, target)


def _answer(case: Case, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    sets = [case.pose(device)]
    one_pass(sets[0])
    reason = sets[0].wrong()
    if reason is None:
        if case.rotate:
            sets = rotation(sets[0], case.pose, device, _SETS)
        ms = milliseconds(in_turn(sets), device)
        reason = sets[0].wrong()
    if reason is not None:
        return {"right": False, "why": reason}
    row: dict[str, Any] = {"right": True, "us": 1e3 * ms, "sets": len(sets)}
    if case.flops:
        row["tflops"] = case.flops / ms / 1e9
    if case.bytes:
        row["gbs"] = case.bytes / ms / 1e6
    if sets[0].tiles:
        row["tiles"] = sets[0].tiles
    return row


def _table(rows: Sequence[Row]) -> str:
    """A line for each group: its fastest case, or why there is none."""
    best: dict[str, Row] = {}
    for row in rows:
        if row.get("us", float("inf")) <= best.get(row["group"], row).get("us", float("inf")):
            best[row["group"]] = row
    return "\n".join(_line(row) for row in best.values())


def _line(row: Row) -> str:
    units = {"us": "us", "tflops": "TFLOP/s", "gbs": "GB/s"}
    found = [f"{row[key]:.1f} {unit}" for key, unit in units.items() if key in row]
    return f"{row['name']}: {', '.join(found) or row.get('why') or row.get('refused')}"
