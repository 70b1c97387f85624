"""The exporter's symbolic sizes as the IR's: `s77` becomes N, and `(s16 - 1)//2 + 1` a `Sym`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastres.graph.specs import Dim, Shape, Sym

Size = int | torch.SymInt


class Place(NamedTuple):
    """Where a variable size is: dimension `dim` of the input at place `input`."""

    input: int
    dim: int


def is_fixed(size: Size) -> bool:
    """Whether a size is one number, be it one that the exporter found out for a free symbol."""
    return isinstance(size, int) or bool(expression(size).is_Integer)


def known(size: Size) -> int | None:
    """A size that is the same for every input; None where it varies."""
    return size if isinstance(size, int) else None


def depends_on_values(size: Size) -> bool:
    """Whether a size has a symbol that no input's size brings: the exporter knows no number."""
    if isinstance(size, int):
        return False
    return any(str(symbol)[0] in "uz" for symbol in expression(size).free_symbols)


def expression(size: Size) -> Any:
    """The sympy expression of a size; torch's stubs call a SymInt an int."""
    node: Any = getattr(size, "node", None)
    return node.expr


def example(size: Size) -> int:
    """What a size is in the exporter's example."""
    node: Any = getattr(size, "node", None)
    return int(size if node is None else node.hint)


class Symbols:
    """Which letter (N, H, W) each symbol of one exported program stands for.

    Args:
        pins: sizes of inputs that are taken for numbers, by the input's number and dimension.
    """

    def __init__(self, pins: Mapping[Place, int] | None = None) -> None:
        self._pins = pins or {}
        self._known: dict[Any, Any] = {}  # symbol → the number that it is pinned at
        self._letters: dict[str, str] = {}
        self._hints: dict[str, int] = {}  # letter → the example's size

    def name_sizes(self, value: torch.Tensor, input_name: str, number: int) -> None:
        """Names the sizes that an input brings; inputs of equal symbols share the letter.

        Args:
            number: of the input.
        """
        letters = ("N", "C", "H", "W") if value.dim() == 4 else ("N",)
        for i, size in enumerate(value.shape):
            if is_fixed(size) or str(expression(size)) in self._letters:
                continue
            if (place := Place(number, i)) in self._pins:
                self._known[expression(size)] = self._pins[place]
                continue
            letter = letters[i] if i < len(letters) else f"D{i}"
            if letter in self._hints:
                letter = f"{letter}_{input_name}"
            self._letters[str(expression(size))] = letter
            self._hints[letter] = example(size)

    def shape(self, value: torch.Tensor) -> tuple[Dim | None, ...]:
        return tuple(self.dim(size) for size in value.shape)

    def dim(self, size: Size) -> Dim | None:
        """A size as the IR writes it; None if it has no such form."""
        if isinstance(size, int):
            return size
        return self._from_expr(expression(size).subs(self._known))

    def text(self, size: Size) -> str:
        """A size in the letters of the IR."""
        if isinstance(size, int):
            return str(size)
        text = str(expression(size))
        for symbol, letter in self._letters.items():
            text = re.sub(rf"\b{symbol}\b", letter, text)
        return text

    def agree(self, shape: Shape, sizes: Sequence[Size]) -> bool:
        """Whether a shape is the exporter's: for every size, or for the example's where its
        expressions have no such form."""
        if len(shape) != len(sizes):
            return False
        for dim, size in zip(shape, sizes, strict=True):
            want = self.dim(size)
            if want is None:
                want = example(size)
                dim = dim.at(self._hints[dim.symbol]) if isinstance(dim, Sym) else dim
            if dim != want:
                return False
        return True

    def _from_expr(self, expr: Any) -> Dim | None:
        if str(expr) in self._letters:
            return Sym(self._letters[str(expr)])
        if expr.is_Integer:
            return int(expr)
        parts = [self._from_expr(a) for a in expr.args]
        syms = [p for p in parts if isinstance(p, Sym)]
        ints = [p for p in parts if isinstance(p, int)]
        if len(syms) != 1 or len(ints) != len(parts) - 1:
            return None
        if expr.is_Add:
            return syms[0].plus(sum(ints))
        if type(expr).__name__ == "FloorDiv" and isinstance(parts[0], Sym) and ints[0] > 0:
            return syms[0].floordiv(ints[0])
        return None
