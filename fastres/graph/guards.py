"""Whether the one path that the exporter followed holds for every size that an engine promises.

A model may decide by a size (`if x.shape[0] > 4`). The exporter follows the branch of its example
and notes the condition as a guard. An engine keeps that one branch for every size, so a guard that
fails for a size the engine would accept is a wrong result in waiting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sympy
import torch.fx.experimental._config as config
from torch.export import ExportedProgram

from fastres.errors import CaptureError
from fastres.graph.symbols import expression, is_fixed
from fastres.options import ANY_BATCH, Input, Sizes

# Where PyTorch decides by sizes and goes on the same either way: before 2.15, rounding the size of
# a pool case by case; and asking whether a copy has to broadcast.
_SAME_EITHER_WAY = ("in div_rtn", "in meta_copy_")
_TRIES = 1 << 22  # combinations of sizes for one guard
_SMALL = 64  # pixels; a program whose guards fail for smaller pictures only takes larger ones
_FUNCTIONS: dict[str, Any] = {  # of torch's own sympy functions
    "FloorDiv": lambda a, b: a // b,
    "Mod": np.mod,
    "PythonMod": np.mod,
    "CeilDiv": lambda a, b: -(-a // b),
    "CleanDiv": lambda a, b: a // b,
    "PowByNatural": np.power,
    "Max": np.maximum,
    "Min": np.minimum,
}


def noting_every_branch() -> AbstractContextManager[Any]:
    """Has the exporter note a comparison of a size with 1 as it does any other.

    By default it takes for granted that no variable size is 1, and a batch of one would run the
    branch of the others unseen; the guards that PyTorch's own operators then leave are gone too.
    """
    settings: Any = config  # its `patch` is put there at run time
    return settings.patch(backed_size_oblivious=True)  # type: ignore[no-any-return]


def check_guards(program: ExportedProgram, inputs: Sequence[Input]) -> None:
    """Raises CaptureError if a guard of the program fails for a size within `inputs`."""
    given = [_with_batches(entry, (1, 1, ANY_BATCH)) for entry in inputs]  # an engine takes any
    failure = _first_failure(program, given)
    if failure is not None:
        raise failure.as_error()


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
    if noted and not _guards(program):
        raise CaptureError(
            f"the program decides by the sizes of its inputs, {noted[0]}, and one that comes from "
            "a file does not show how. Compile it before it is saved, or export it with fixed sizes"
        )
    while (failure := _first_failure(program, given)) is not None:
        small = [size for size, n in failure.at.items() if size.dim > 0 and n < _SMALL]
        if not small:
            raise failure.as_error()
        for size in small:
            given[size.input] = _above(given[size.input], size.dim, failure.at[size])
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


@dataclass(frozen=True)
class _Size:
    """A variable size: dimension `dim` of the input at place `input`, from `low` to `high`."""

    name: str
    input: int
    dim: int
    low: int
    high: int

    def tries(self, named: Sequence[int], limit: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """All sizes if few; else both ends, those next to a number in the guard, and some between.

        Batches beyond the end as well, since any is taken: near numbers, and powers of 2.
        """
        any_batch = not self.dim and self.high == ANY_BATCH
        end = 1 << 31 if any_batch else self.high
        near = [n + d for n in named for d in (-1, 0, 1) if self.low <= n + d <= end]
        powers = [1 << n for n in range(16, 32)] if any_batch else []
        inside = np.arange(self.low, self.high + 1)
        if len(inside) > limit:
            spread = inside[:: math.ceil(2 * len(inside) / limit)]
            inside = np.concatenate([inside[: limit // 2], spread, inside[-1:]])
        return np.unique(np.concatenate([inside, near, powers]).astype(np.int64))


@dataclass(frozen=True)
class _Failure:
    """A guard, how it reads, where it was noted, and sizes for which it does not hold."""

    text: str
    where: str
    at: Mapping[_Size, int]

    def as_error(self) -> CaptureError:
        at = " and ".join(f"{size.name} = {n}" for size, n in self.at.items())
        return CaptureError(
            f"the model was followed where {self.text}, as the example has it {self.where}; for "
            f"{at} it does something else or does not run, but an engine would do the same for "
            "every size. Rewrite the line that decides by the size, or give an Input that fixes H "
            "and W"
        )


def _guards(program: ExportedProgram) -> dict[Any, str]:
    """Each guard with the place that noted it."""
    found: dict[Any, str] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        for size in getattr(value, "shape", ()):
            if not isinstance(size, int):
                found.update((g.expr, str(g.sloc)) for g in size.node.shape_env.guards)
    return {
        guard: where
        for guard, where in found.items()
        if not any(place in where for place in _SAME_EITHER_WAY)
    }


def _first_failure(program: ExportedProgram, inputs: Sequence[Input]) -> _Failure | None:
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    free: dict[Any, _Size] = {}
    for place, name in enumerate(program.graph_signature.user_inputs):
        for dim, size in enumerate(nodes[str(name)].meta["val"].shape):
            if not is_fixed(size):
                ends = inputs[place].smallest[dim], inputs[place].largest[dim]
                free[expression(size)] = _Size(f"{name}.shape[{dim}]", place, dim, *ends)
    for guard, where in _guards(program).items():
        at = _counterexample(guard, free)
        if at is not None:
            names = {symbol: sympy.Symbol(size.name) for symbol, size in free.items()}
            return _Failure(str(guard.xreplace(names)), where, at)
    return None


def _counterexample(guard: Any, free: Mapping[Any, _Size]) -> dict[_Size, int] | None:
    """Sizes for which the guard is false; None if every combination that is tried meets it."""
    symbols = sorted(guard.free_symbols & free.keys(), key=str)
    if not symbols or guard.free_symbols - free.keys():
        return None
    named = [int(n) for n in guard.atoms(sympy.Integer)]
    each = int(_TRIES ** (1 / len(symbols)))
    tries = [free[symbol].tries(named, each) for symbol in symbols]
    holds = sympy.lambdify(symbols, guard, modules=[_FUNCTIONS, "numpy"])
    try:
        found = np.asarray(holds(*np.meshgrid(*tries, indexing="ij", sparse=True)), dtype=bool)
    except (NameError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CaptureError(
            f"the model decides by its sizes, {guard}, in a way that cannot be checked for others: "
            f"{error}. Rewrite the line that decides by the size"
        ) from error
    failing = np.argwhere(~np.broadcast_to(found, tuple(len(t) for t in tries)))
    if not len(failing):
        return None
    pairs = zip(symbols, tries, failing[0], strict=True)
    return {free[symbol]: int(sizes[i]) for symbol, sizes, i in pairs}
