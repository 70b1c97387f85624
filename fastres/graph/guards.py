"""Whether the one path that the exporter followed holds for every size that an engine promises.

A model may decide by a size (`if x.shape[0] > 4`). The exporter follows the branch of its example
and notes the condition as a guard. An engine keeps that one branch for every size, so a guard that
fails for a size the engine would accept is a wrong result in waiting.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import sympy
import torch.fx.experimental._config as config
from torch.export import ExportedProgram

from fastres.errors import CaptureError
from fastres.graph.symbols import expression, is_fixed
from fastres.options import ANY_BATCH, Input

_SAME_EITHER_WAY = "in div_rtn"  # where PyTorch before 2.15 divides sizes of pools, case by case
_TRIES = 1024  # sizes tried for one guard: every size of a usual range, or as many spread over it


def noting_every_branch() -> AbstractContextManager[Any]:
    """Has the exporter note a comparison of a size with 1 as it does any other.

    By default it takes for granted that no variable size is 1, and a batch of one would run the
    branch of the others unseen; the guards that PyTorch's own operators then leave are gone too.
    """
    settings: Any = config  # its `patch` is put there at run time
    return settings.patch(backed_size_oblivious=True)  # type: ignore[no-any-return]


def check_guards(program: ExportedProgram, inputs: Sequence[Input]) -> None:
    """Raises CaptureError if a guard of the program fails for a size within `inputs`."""
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    free: dict[Any, tuple[str, range]] = {}  # symbol → how it reads, and its sizes
    guards: dict[Any, Any] = {}
    for name, spec in zip(program.graph_signature.user_inputs, inputs, strict=True):
        for i, size in enumerate(nodes[str(name)].meta["val"].shape):
            if is_fixed(size):
                continue
            sizes = range(spec.smallest[i], spec.largest[i] + 1) if i else range(1, ANY_BATCH + 1)
            free[expression(size)] = (f"{name}.shape[{i}]", sizes)
            for guard in size.node.shape_env.guards:
                if _SAME_EITHER_WAY not in str(guard.sloc):
                    guards[guard.expr] = guard
    for guard in guards.values():
        failing = _counterexample(guard.expr, {s: sizes for s, (_, sizes) in free.items()})
        if failing is not None:
            names = {symbol: sympy.Symbol(name) for symbol, (name, _) in free.items()}
            at = " and ".join(f"{names[symbol]} = {size}" for symbol, size in failing.items())
            raise CaptureError(
                f"the model was followed where {guard.expr.xreplace(names)}, as the example has it "
                f"{guard.sloc}; for {at} it does something else or does not run, but an engine "
                "would do the same for every size. Rewrite the line that decides by the size, or "
                "give an Input that fixes H and W"
            )


def _counterexample(guard: Any, free: Mapping[Any, range]) -> dict[Any, int] | None:
    """Sizes for which the guard is false; None if every combination that is tried meets it."""
    symbols = sorted(guard.free_symbols & free.keys(), key=str)
    named = {int(n) for n in guard.atoms(sympy.Integer)}
    each = int(_TRIES ** (1 / max(1, len(symbols))))
    for sizes in itertools.product(*(list(_tries(free[s], named, each)) for s in symbols)):
        tried = dict(zip(symbols, sizes, strict=True))
        holds = guard.xreplace({s: sympy.Integer(n) for s, n in tried.items()})
        if holds == sympy.false:
            return tried
    return None


def _tries(sizes: range, named: set[int], limit: int) -> Iterator[int]:
    """All sizes if few; else both ends, those next to a number in the guard, and some between."""
    if len(sizes) <= limit:
        yield from sizes
        return
    near = {n + d for n in named for d in (-1, 0, 1)} & set(sizes)
    first = set(sizes[: limit // 2])
    step = math.ceil(len(sizes) / (limit // 2))
    yield from sorted(near | first | set(sizes[::step]) | {sizes[-1]})
