"""fastres.graph.conditions: the numbers that sympy and PyTorch give, for many sizes at once."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import sympy
import torch.utils._sympy.functions as functions
from sympy import Symbol

from fastres.graph.conditions import _FUNCTIONS, evaluate

S, T = Symbol("s", integer=True, positive=True), Symbol("t", integer=True, positive=True)
SIZES = (np.arange(1, 40)[:, None], np.array([1, 2, 3, 7, 31, 64])[None, :])
F = functions

EXPRESSIONS: dict[str, Any] = {
    "and": sympy.And(S >= 3, T >= 3),
    "or": sympy.Or(S > 30, sympy.Eq(T, 7), sympy.Ne(S, 5)),
    "not": sympy.Not(sympy.And(S > 3, T < 9)),
    "half": F.FloorDiv(S - 1, 2) * F.FloorDiv(T + 2, 3),
    "rounded up": F.CeilDiv(S, 3),
    "remainder": sympy.Eq(F.Mod(S * T, 4), 0),
    "remainder of negative numbers": F.PythonMod(S - 20, 7),
    "indexing": F.ModularIndexing(S * T, 3, 5),
    "largest": F.Max(S, T, 5),
    "smallest": F.Min(S + 1, 2 * T),
    "square": S**2 - T**3,
    "natural power": F.PowByNatural(S, F.Min(T, 9)),
    "fraction": F.IntTrueDiv(S, T) > 1.5,
    "fraction of floats": F.FloatTrueDiv(F.ToFloat(S), 3.0),
    "power of floats": F.FloatPow(F.ToFloat(S), 0.5),
    "ceiling": F.CeilToInt(F.IntTrueDiv(S, 3)),
    "floor": F.FloorToInt(F.FloatTrueDiv(F.ToFloat(S), 2.5)),
    "cut": F.TruncToInt(0.7 * F.ToFloat(S)),
    "cut to a float": F.TruncToFloat(0.7 * F.ToFloat(S)),
    "rounded": F.RoundToInt(0.5 * F.ToFloat(S)),
    "two digits": F.RoundDecimal(F.IntTrueDiv(S, T), 2),
    "shifted": F.LShift(S, 3) + F.RShift(T, 1),
    "bits": F.BitwiseFn_bitwise_and(S, 6) + F.BitwiseFn_bitwise_or(S, 1),
    "bits that differ": F.BitwiseFn_bitwise_xor(S, T),
    "chosen": F.Where(S > T, S, T),
    "dense": F.IsNonOverlappingAndDenseIndicator(S, T, T, 1),
    "with gaps": F.IsNonOverlappingAndDenseIndicator(S, T, 2 * T, 1),
    "root": F.OpaqueUnaryFn_sqrt(F.ToFloat(S)) < 4,
    "itself": F.Identity(S),
    "distance": sympy.Abs(3 - T),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_gives_what_sympy_gives(name: str) -> None:
    expression = EXPRESSIONS[name]
    found = np.broadcast_to(evaluate(expression, {S: SIZES[0], T: SIZES[1]}), (39, 6))
    for i, s in enumerate(SIZES[0].flat):
        for j, t in enumerate(SIZES[1].flat):
            want = expression.xreplace({S: sympy.Integer(int(s)), T: sympy.Integer(int(t))})
            assert number(found[i, j]) == pytest.approx(number(want), rel=1e-12), (s, t)


def number(value: Any) -> float:
    if isinstance(value, F.Identity):
        return float(value.args[0])
    return float(bool(value) if value in (sympy.true, sympy.false) else value)


def test_every_function_of_pytorch_is_known() -> None:
    def is_function(value: object) -> bool:
        return inspect.isclass(value) and issubclass(value, sympy.Basic)

    bases = {"MinMaxBase", "Expr", "LatticeOp", "Application", "Basic", "Function"}
    names = {c.__name__ for _, c in inspect.getmembers(functions, is_function)}
    ours = {n for n in names if getattr(functions, n, sympy.Expr).__module__ == functions.__name__}
    assert len(ours) > 30 and ours - bases <= _FUNCTIONS.keys()


def test_huge_products_are_exact() -> None:
    big = np.array([2**31, 2**31 + 1])
    assert list(evaluate(S**3 - F.Identity(S**2) * S, {S: big})) == [0, 0]
    assert list(evaluate(sympy.Eq(F.Mod(S**3, 2), 0), {S: big})) == [True, False]
    assert list(evaluate(S * T >= 2**62, {S: big, T: big})) == [True, True]


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        (sympy.gamma(S), LookupError),
        (S + Symbol("u0"), LookupError),
        (F.OpaqueUnaryFn_log(F.ToFloat(S) - 5.0), ValueError),
    ],
    ids=str,
)
def test_what_has_no_value(expression: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        evaluate(expression, {S: SIZES[0], T: SIZES[1]})


@pytest.mark.parametrize(
    "expression",
    [
        sympy.Eq(F.FloorDiv(S, T - 7), S),
        sympy.Ne(F.Mod(6, F.FloorDiv(T, 7)), 0),  # batches under 7: as PyTorch's strides have it
        sympy.Ne(F.PythonMod(S, T - 7), 3),
        F.CeilToInt(F.IntTrueDiv(S, T - 7)) >= 0,
    ],
    ids=str,
)
def test_what_divides_by_zero_is_no_condition_that_holds(expression: Any) -> None:
    found = np.broadcast_to(evaluate(expression, {S: SIZES[0], T: SIZES[1]}), (39, 6))
    for i, s in enumerate(SIZES[0].flat):
        for j, t in enumerate(SIZES[1].flat):
            try:
                want = expression.xreplace({S: sympy.Integer(int(s)), T: sympy.Integer(int(t))})
                assert found[i, j] == (want == sympy.true), (s, t)
            except ZeroDivisionError:
                assert not found[i, j], (s, t)
