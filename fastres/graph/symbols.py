"""The exporter's symbolic sizes as the IR's: `s77` becomes N, and `(s16 - 1)//2 + 1` a `Sym`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.fx

from fastres.errors import CaptureError
from fastres.graph.names import place_of
from fastres.graph.specs import Dim, Shape, Sym
from fastres.options import Input

Size = int | torch.SymInt
_EXTREMES = ("Max", "Min")  # sympy's, and PyTorch's of the same names


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
        inputs: what the sizes range over.
        pins: sizes of inputs that are taken for numbers, by the input's number and dimension.
    """

    def __init__(
        self, inputs: Sequence[Input] = (), pins: Mapping[Place, int] | None = None
    ) -> None:
        self._inputs = inputs
        self._pins = pins or {}
        self._ranges: dict[Any, tuple[int, int]] = {}  # of H and W, both ends included
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
            if i > 0 and number < len(self._inputs):
                entry = self._inputs[number]
                self._ranges[expression(size)] = entry.smallest[i], entry.largest[i]
            self._hints[letter] = example(size)

    def shape(self, node: torch.fx.Node) -> Shape:
        """The shape of what a node gives, as the IR writes it.

        Raises:
            CaptureError: a size has no such form, or depends on values.
        """
        return tuple(self._written(node, size) for size in node.meta["val"].shape)

    def _written(self, node: torch.fx.Node, size: Size) -> Dim:
        dim = self.dim(size)
        if dim is not None:
            return dim
        if depends_on_values(size):
            raise CaptureError(
                f"{node.target} in {place_of(node)} has a size that depends on the numbers in a "
                "tensor, or on where a slice ends; an engine's sizes follow from those of its "
                "inputs. Use a mask, or torch.where, in place of what picks some of the elements; "
                "fix H and W if a slice is taken by them"
            )
        raise CaptureError(
            f"{node.target} in {place_of(node)} has a size of {self.text(size)}, which is not of "
            "the form (k*N + a) // b. Fix H and W if they are in it; write x.size(0) where the "
            "batch is meant; where the model joins the batch with something else, compile "
            "torch.export.export(model, (x,)) for that batch size"
        )

    def dim(self, size: Size) -> Dim | None:
        """A size as the IR writes it; None if it has no such form."""
        if isinstance(size, int):
            return size
        return self._from_expr(self._settled(expression(size).subs(self._known)))

    def _settled(self, expr: Any) -> Any:
        """Without each Max and Min of which one operand is it for every size that there may be.

        So the exporter says where a slice ends: x[:, :, 1:-1] has Max(0, H - 2) rows.
        """
        if expr.is_Atom:
            return expr
        from fastres.graph.conditions import evaluate  # 0.3 s: sympy

        def extreme(part: Any) -> Any:
            if len(part.free_symbols) != 1 or not part.free_symbols <= self._ranges.keys():
                return part
            (symbol,) = part.free_symbols
            low, high = self._ranges[symbol]
            sizes = {symbol: np.arange(low, high + 1)}
            found = evaluate(part, sizes)
            same = (arg for arg in part.args if np.all(evaluate(arg, sizes) == found))
            return next(same, part)

        return expr.replace(lambda part: type(part).__name__ in _EXTREMES, extreme)

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
        if (
            expr.is_Add
            and len(taken := [a for a in expr.args if a.could_extract_minus_sign()]) == 1
        ):
            whole, part = self._from_expr(expr - taken[0]), self._from_expr(-taken[0])
            if isinstance(whole, Sym) and isinstance(part, Sym):
                return whole.minus(part)
        parts = [self._from_expr(a) for a in expr.args]
        syms = [p for p in parts if isinstance(p, Sym)]
        ints = [p for p in parts if isinstance(p, int)]
        if len(syms) != 1 or len(ints) != len(parts) - 1:
            return None
        if expr.is_Add:
            return syms[0].plus(sum(ints))
        if expr.is_Mul:
            return syms[0].times(math.prod(ints))
        if type(expr).__name__ == "FloorDiv" and isinstance(parts[0], Sym) and ints[0] > 0:
            return syms[0].floordiv(ints[0])
        return None
