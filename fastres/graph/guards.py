"""For which sizes the path that the exporter followed through a model holds.

A model may decide by a size (`if x.shape[0] > 4`), and so do PyTorch's own operators (which memory
format a convolution gives). The exporter follows the branch of its example and notes the condition
as a guard. An engine keeps one path for every size, so `fastres.graph.branches` exports again where
a guard fails for a size that the engine would accept, and compares.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import sympy
import torch
import torch.fx.experimental._config as config
from torch.export import ExportedProgram

from fastres.errors import CaptureError
from fastres.graph.conditions import evaluate
from fastres.graph.symbols import Place, expression, is_fixed
from fastres.options import ANY_BATCH, Input, Sizes

Array = np.ndarray[Any, Any]
_TRIES = 1 << 22  # combinations of sizes for one guard
# Before 2.14 PyTorch asked of every pool whether its stride divides the size, and rounded down
# either way. Each of these would be two paths for a pool and a side, and four for a ResNet.
_NO_BRANCH = "in div_rtn"
_SMALL = 64  # pixels; a program whose guards fail for smaller pictures only takes larger ones


def noting_every_branch() -> AbstractContextManager[Any]:
    """Has the exporter note a comparison of a size with 1 as it does any other.

    By default it takes for granted that no variable size is 1, and a batch of one would run the
    branch of the others unseen; the guards that PyTorch's own operators then leave are gone too.
    """
    settings: Any = config  # its `patch` is put there at run time
    return settings.patch(backed_size_oblivious=True)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Failure:
    """A guard, how it reads, where it was noted, and sizes for which it does not hold.

    Args:
        own: those of these sizes that the guard is about.
        equal: pairs of sizes that are one in the model, of which `at` has the first.
    """

    text: str
    where: str
    at: Mapping[Place, int]
    own: Mapping[Place, int]
    names: Mapping[Place, str]
    equal: Sequence[tuple[Place, Place]]

    def __str__(self) -> str:
        at = " and ".join(f"{self.names[place]} = {n}" for place, n in self.at.items())
        return (
            f"the model was followed where {self.text}, as the example has it {self.where}; for "
            f"{at} it does"
        )

    def shapes(self, usual: Sequence[Sizes]) -> list[Sizes]:
        """The shapes with these sizes in them."""
        changed = [list(shape) for shape in usual]
        also = {other: self.at[one] for one, other in self.equal if one in self.at}
        for place, size in {**self.at, **also}.items():
            changed[place.input][place.dim] = size
        return [tuple(shape) for shape in changed]


def first_failure(
    program: ExportedProgram,
    others: Sequence[tuple[ExportedProgram, Mapping[Place, int]]],
    inputs: Sequence[Input],
) -> Failure | None:
    """Sizes that an engine for `inputs` takes and no path holds for; None if there are none.

    Args:
        others: the same model exported at other sizes. Where all guards of one of them hold, so
            does its path, or only for certain sizes.
    """
    given = [_with_batches(entry, (1, 1, ANY_BATCH)) for entry in inputs]  # an engine takes any
    return _first_failure(_Path(program), [_Path(other, only) for other, only in others], given)


def where_fixed(size: Any) -> str:
    """The line of the model that made a number of a size that was free; empty if none says so."""
    for guard in size.node.shape_env.guards:
        if isinstance(guard.expr, sympy.Eq) and guard.expr.rhs == int(size):
            where = _whole(str(guard.sloc))
            return f" {where}" if where.startswith("(/") else ""
    return ""


def within_guards(program: ExportedProgram, inputs: Sequence[Input]) -> tuple[Input, ...]:
    """The inputs of a program exported elsewhere, without pictures too small for its guards.

    PyTorch's own operators leave such guards: that a feature map is not a single pixel.

    Raises:
        CaptureError: a guard fails for a batch, or for pictures that are not small; or it cannot be
            seen, because the program comes from a file.
    """
    # such a program takes for granted that no batch is of one, and is taken at its word there
    given = [_with_batches(entry, (2, 2, max(2, entry.largest[0]))) for entry in inputs]
    noted = getattr(program, "_guards_code", None) or []
    path = _Path(program)
    if noted and not path.guards:
        raise CaptureError(
            f"the program decides by the sizes of its inputs, {noted[0]}, and one that comes from "
            "a file does not show how. Compile it before it is saved, or export it with fixed sizes"
        )
    while (failure := _first_failure(path, [], given)) is not None:
        small = [place for place, n in failure.at.items() if place.dim > 0 and n < _SMALL]
        if not small:
            raise CaptureError(
                f"{failure} something else or does not run, but an engine would do the same for "
                "every size. Export the model anew with sizes that it takes, or with fixed ones"
            )
        for place in small:
            given[place.input] = _above(given[place.input], place.dim, failure.at[place])
    return tuple(
        _with_batches(entry, (was.smallest[0], was.usual[0], was.largest[0]))
        for entry, was in zip(given, inputs, strict=True)
    )


def _with_batches(entry: Input, batches: tuple[int, int, int]) -> Input:
    shapes = zip(batches, (entry.smallest, entry.usual, entry.largest), strict=True)
    low, usual, high = ((batch, *shape[1:]) for batch, shape in shapes)
    return replace(entry, shape=(low, usual, high))


def _above(entry: Input, dim: int, size: int) -> Input:
    def raised(shape: Sizes) -> Sizes:
        return (*shape[:dim], max(shape[dim], size + 1), *shape[dim + 1 :])

    return replace(entry, shape=(raised(entry.smallest), raised(entry.usual), entry.largest))


class _Path:
    """The guards of one program, each with the place that noted it, and its variable sizes.

    Args:
        only: the sizes for which the path is known to hold, where others are not.
    """

    def __init__(self, program: ExportedProgram, only: Mapping[Place, int] | None = None) -> None:
        self.only = only or {}
        self.symbols: dict[Any, Place] = {}
        self.equal: list[tuple[Place, Place]] = []  # sizes that are one here
        self.names: dict[Place, str] = {}
        self.guards: dict[Any, str] = {}
        nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
        for i, name in enumerate(program.graph_signature.user_inputs):
            for dim, size in enumerate(nodes[str(name)].meta["val"].shape):
                if isinstance(size, int):
                    continue
                noted = ((g.expr, _whole(str(g.sloc))) for g in size.node.shape_env.guards)
                self.guards.update((g, where) for g, where in noted if _NO_BRANCH not in where)
                if not is_fixed(size):
                    place = Place(i, dim)
                    first = self.symbols.setdefault(expression(size), place)
                    if first != place:
                        self.equal.append((first, place))
                    self.names[place] = f"{name}.shape[{dim}]"

    def places(self, guard: Any) -> set[Place]:
        return {self.symbols[s] for s in guard.free_symbols if s in self.symbols}

    def holds(self, guard: Any, sizes: Mapping[Place, Array]) -> Array:
        """Whether a guard holds, for each combination of sizes."""
        if guard.free_symbols - self.symbols.keys():
            return np.asarray(True)  # it is about values, which capture refuses by name
        try:
            found = evaluate(guard, {s: sizes[p] for s, p in self.symbols.items() if p in sizes})
        except (LookupError, ArithmeticError, ValueError) as error:
            raise CaptureError(
                f"the model decides by its sizes, {guard}, in a way that cannot be checked for "
                f"others: {error}. Rewrite the line that decides by the size"
            ) from error
        return found.astype(bool)

    def covers(self, sizes: Mapping[Place, Array]) -> Array:
        """Whether the path holds, for each combination of sizes, of which one may be two here."""
        every = [self.holds(guard, sizes) for guard in self.guards]
        every += [sizes[place] == size for place, size in self.only.items()]
        every += [sizes[a] == sizes[b] for a, b in self.equal if a in sizes and b in sizes]
        return np.logical_and.reduce(np.broadcast_arrays(True, *every))  # type: ignore[no-any-return]

    def text(self, guard: Any) -> str:
        names = {s: sympy.Symbol(self.names[place]) for s, place in self.symbols.items()}
        return str(guard.xreplace(names))


def _whole(where: str) -> str:
    """A place in the code with its whole path.

    PyTorch cuts off what the path shares with its own, and one character more where that is the
    root alone: "mp/model.py".
    """
    cut = re.match(r"\((.+\.py):\d", where)
    if cut is None or (Path(torch.__file__).parent / cut[1]).exists():
        return where
    files = (getattr(module, "__file__", None) or "" for module in list(sys.modules.values()))
    whole = next((f for f in files if f.endswith(f"/{cut[1]}") or f[2:] == cut[1]), None)
    return where if whole is None else where.replace(cut[1], whole, 1)


def _first_failure(path: _Path, others: Sequence[_Path], inputs: Sequence[Input]) -> Failure | None:
    rest = [guard for other in others for guard in other.guards]
    elsewhere = {p for o in others for g in o.guards for p in o.places(g)}
    elsewhere.update(place for other in others for place in other.only)
    apart = [pair for other in others for pair in other.equal if pair not in path.equal]
    elsewhere.update(place for pair in apart for place in pair)
    for guard, where in path.guards.items():
        places = path.places(guard)
        if not places:
            continue
        failing = ~path.holds(guard, grid := _grid(places, [guard], inputs))
        if others and failing.any():
            grid = _grid(places | elsewhere, [guard, *rest], inputs)
            failing = ~path.holds(guard, grid)
            for other in others:
                failing = failing & ~other.covers(grid)
        if (at := _smallest(failing, grid)) is not None:
            own = {place: n for place, n in at.items() if place in places}
            return Failure(path.text(guard), where, at, own, path.names, path.equal)
    return None


def _grid(places: set[Place], guards: Sequence[Any], inputs: Sequence[Input]) -> dict[Place, Array]:
    """Sizes to try at each place, to be combined by broadcasting."""
    order = sorted(places)
    named = [int(n) for guard in guards for n in guard.atoms(sympy.Integer)]
    each = int(_TRIES ** (1 / len(order)))
    tries = (list(_tries(place, inputs[place.input], named, each)) for place in order)
    grid = np.meshgrid(*(np.asarray(t, dtype=np.int64) for t in tries), indexing="ij", sparse=True)
    return dict(zip(order, grid, strict=True))


def _tries(place: Place, entry: Input, named: Sequence[int], limit: int) -> Iterator[int]:
    """All sizes if few; else both ends, those next to a number in the guards, and some between.

    Batches beyond the end as well, since any is taken: near numbers, and powers of 2.
    """
    low, high = entry.smallest[place.dim], entry.largest[place.dim]
    any_batch = not place.dim and high == ANY_BATCH
    end = 1 << 31 if any_batch else high
    near = [n + d for n in named for d in (-1, 0, 1) if low <= n + d <= end]
    powers = [1 << n for n in range(16, 32)] if any_batch else []
    inside = np.arange(low, high + 1)
    if len(inside) > limit:
        spread = inside[:: math.ceil(2 * len(inside) / limit)]
        inside = np.concatenate([inside[: limit // 2], spread, inside[-1:]])
    yield from np.unique(np.concatenate([inside, near, powers]).astype(np.int64))


def _smallest(failing: Array, grid: Mapping[Place, Array]) -> dict[Place, int] | None:
    """The first combination for which something fails."""
    shape = np.broadcast_shapes(*(sizes.shape for sizes in grid.values()))
    found = np.argwhere(np.broadcast_to(failing, shape))
    if not len(found):
        return None
    return {
        place: int(np.broadcast_to(sizes, shape)[tuple(found[0])]) for place, sizes in grid.items()
    }
