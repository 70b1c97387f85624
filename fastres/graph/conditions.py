"""Conditions on sizes, as torch.export notes them, evaluated for many sizes at once.

A condition is a sympy expression over the exporter's size symbols, built of sympy's own operations
and of functions that PyTorch adds (`torch.utils._sympy.functions`), which mean what Python does
with sizes: `//` rounds down, `/` gives a float, a power of integers is an integer. A comparison
with what was divided by zero is False: for such sizes the model takes another path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import numpy as np
import sympy

Array = np.ndarray[Any, Any]
_EXACT = 2.0**62  # beyond, products of int64 might overflow: Python's integers take over


def evaluate(expression: Any, sizes: Mapping[Any, Array]) -> Array:
    """What an expression gives, by the rules of broadcasting.

    Args:
        sizes: for each symbol, integers.

    Raises:
        LookupError: a symbol or function that is not known here; names it.
        ArithmeticError, ValueError: it has no value for some of the sizes.
    """
    if expression in sizes:
        return sizes[expression]
    if expression.is_Integer:
        return np.asarray(int(expression))
    if expression in (sympy.true, sympy.false):
        return np.asarray(expression == sympy.true)
    if expression.is_Number:
        return np.asarray(float(expression))
    name = type(expression).__name__
    if name not in _FUNCTIONS:
        raise LookupError(f"{name} in {expression}")
    with np.errstate(all="ignore"):  # what is no number fails every comparison
        return np.asarray(_FUNCTIONS[name](*(evaluate(arg, sizes) for arg in expression.args)))


def _over_all(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Of two operands → of any number."""
    return lambda *args: reduce(function, args)


def _product(a: Array, b: Array) -> Any:
    if _largest(a) * _largest(b) >= _EXACT and a.dtype.kind in "iu" and b.dtype.kind in "iu":
        a = a.astype(object)
    return a * b


def _power(a: Array, b: Array) -> Any:
    if a.dtype.kind in "iu" and b.dtype.kind in "iu":
        if np.any(b < 0):  # sympy writes 1 / x so
            return a.astype(float) ** b
        if max(_largest(a), 2.0) ** min(_largest(b), 1024.0) >= _EXACT:
            a = a.astype(object)
    return a**b


def _largest(a: Array) -> float:
    return float(np.max(np.abs(a), initial=0))


def _division(a: Array, b: Array) -> Any:
    return a / _or_nan(b)


def _floor_division(a: Array, b: Array) -> Any:
    return a // _or_nan(b)


def _remainder(a: Array, b: Array) -> Any:
    return a % _or_nan(b)


def _or_nan(divisor: Array) -> Array:
    """NaN instead of 0, and so in all that is computed of it."""
    zero = divisor == 0
    return np.where(zero, np.nan, divisor.astype(float)) if np.any(zero) else divisor


def _unequal(a: Array, b: Array) -> Any:
    return (a < b) | (a > b)  # not of NaN, unlike !=


def _whole(rounded: Callable[[Any], Any]) -> Callable[[Array], Any]:
    def whole(a: Array) -> Any:
        if a.dtype.kind in "iuO":
            return a
        found = rounded(a)
        return found.astype(np.int64) if np.isfinite(found).all() else found

    return whole


def _dense(*args: Array) -> Any:
    """1 where sizes (the first half) and strides are of memory without gaps or overlaps."""
    count = len(args) // 2

    def one(*values: int) -> int:
        expected = 1
        for stride, size in sorted(zip(values[count:], values[:count], strict=True)):
            if size == 1:
                continue
            if stride != expected:
                return 0
            expected *= size
        return 1

    return np.vectorize(one, otypes=[np.int64])(*args)


def _opaque(name: str) -> Callable[[Array], Any]:
    return lambda a: np.vectorize(getattr(math, name), otypes=[float])(a)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "And": _over_all(np.logical_and),
    "Or": _over_all(np.logical_or),
    "Not": np.logical_not,
    "Equality": np.equal,
    "Unequality": _unequal,
    "StrictLessThan": np.less,
    "LessThan": np.less_equal,
    "StrictGreaterThan": np.greater,
    "GreaterThan": np.greater_equal,
    "Add": _over_all(lambda a, b: a + b),
    "Mul": _over_all(_product),
    "Pow": _power,
    "Abs": np.abs,
    "Max": _over_all(np.maximum),
    "Min": _over_all(np.minimum),
    "FloorDiv": _floor_division,
    "CleanDiv": _floor_division,
    "CeilDiv": lambda a, b: -_floor_division(-a, b),
    "Mod": _remainder,
    "PythonMod": _remainder,
    "ModularIndexing": lambda a, b, c: _remainder(_floor_division(a, b), c),
    "PowByNatural": _power,
    "FloatPow": lambda a, b: a.astype(float) ** b,
    "IntTrueDiv": _division,
    "FloatTrueDiv": _division,
    "LShift": lambda a, b: _product(a, _power(np.asarray(2), b)),
    "RShift": lambda a, b: a // _power(np.asarray(2), b),
    "Where": np.where,
    "Identity": lambda a: a,
    "ToFloat": lambda a: a.astype(float),
    "FloorToInt": _whole(np.floor),
    "CeilToInt": _whole(np.ceil),
    "TruncToInt": _whole(np.trunc),
    "TruncToFloat": lambda a: np.trunc(a.astype(float)),
    "RoundToInt": _whole(np.rint),
    "RoundDecimal": lambda a, digits: np.vectorize(round, otypes=[float])(
        a.astype(float), digits.astype(int)
    ),
    "IsNonOverlappingAndDenseIndicator": _dense,
    "BitwiseFn_bitwise_and": lambda a, b: a & b,
    "BitwiseFn_bitwise_or": lambda a, b: a | b,
    "BitwiseFn_bitwise_xor": lambda a, b: a ^ b,
    **{
        f"OpaqueUnaryFn_{name}": _opaque(name)
        for name in (
            *("sqrt", "exp", "log", "log2", "sin", "cos", "tan", "asin", "acos", "atan"),
            *("sinh", "cosh", "tanh", "asinh"),
        )
    },
}
