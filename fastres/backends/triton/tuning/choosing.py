"""Where the tiles of an engine come from: the user's measurements, the shipped ones, estimates."""

from __future__ import annotations

import torch

from fastres.backends.shape_cache import Shapes
from fastres.backends.triton.planning.lower import make_plan
from fastres.backends.triton.planning.plan import Plan
from fastres.backends.triton.planning.table import (
    Table,
    Tiles,
    cache_path,
    read_table,
    shipped,
    this_machine,
    write_table,
)
from fastres.backends.triton.planning.vendor import library
from fastres.errors import UnsupportedError
from fastres.graph.ir import Graph
from fastres.kernels.cost import Target, target_of
from fastres.options import Options
from fastres.text import progress_bar


def tiles_for(options: Options, device: torch.device) -> Tiles:
    """The best known tiles on a device.

    Raises:
        ArtifactError: the user's table is damaged.
    """
    if device.type != "cuda":
        # the interpreter runs one block after the other, like a GPU with a single SM
        return Tiles(Target(90, 1))
    machine = this_machine(device)
    own = read_table(cache_path(machine, options.cache_dir), machine)
    return Tiles(target_of(device), [own, shipped(machine)], library(device))


def ban(tiles: Tiles, plan: Plan, node: str, reason: str) -> None:
    """Takes the tile with which a plan runs a node out of the choice for its problem.

    Raises:
        UnsupportedError: the node has no tile that could be another.
    """
    tile = next((getattr(s, "tile", None) for s in plan.steps if s.node == node), None)
    problem = problem_of(plan, node)
    if tile is None or problem is None:
        raise UnsupportedError(f"{node} cannot run on sm_{tiles.target.sm}: {reason}")
    tiles.ban(problem, tile, f"{node}: {reason}")


def problem_of(plan: Plan, node: str) -> str | None:
    """The key of what a node's step was reckoned as; None of a step without a choice.

    A chain's choice names the next block's 1x1 too, also where that stays a kernel of its own: its
    own choice comes later.
    """
    own = (c.problem for c in reversed(plan.choices) if node in c.nodes and c.problem)
    return next(own, None)


def tuned(graph: Graph, options: Options, device: torch.device, shapes: Shapes) -> Tiles:
    """The same after everything has been measured that a plan for these shapes may want.

    What is measured is kept in the user's table.

    Raises:
        ArtifactError: that table is damaged, or cannot be written.
    """
    from fastres.backends.triton.tuning.tune import tune

    machine = this_machine(device)
    path = cache_path(machine, options.cache_dir)
    table = read_table(path, machine)
    tiles = tiles_for(options, device)
    make_plan(graph, shapes, options.precision or "fp32", tiles)  # asks for every form there is

    def keep(table: Table) -> None:
        write_table(path, table)

    with progress_bar("tuning") as report:
        tune(tiles.asked(), table, device, keep=keep, progress=report)
    return Tiles(tiles.target, [table, shipped(machine)], tiles.library)
