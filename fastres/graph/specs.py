"""Sizes, shapes and element types of values; a size may be an expression in N, H and W."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping

import msgspec
import torch

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "bool": torch.bool,
}
EIGHT_BITS = ("int8", "uint8", "float8_e4m3fn")  # what values are quantised to
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
GIVEN_DTYPES = frozenset(DTYPE_NAMES) - {torch.float8_e4m3fn}  # what models and inputs may be of


class Sym(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """A size that is not known yet: floor((mul * symbol + add) / div), symbol one of N, H, W.

    Convolution and pooling sizes are closed under this form, because
    floor((x + a)/d) + b = floor((x + a + b*d)/d) and floor(floor(x/a)/b) = floor(x/(a*b)); and
    since `mul` and `div` share no factor, two sizes are equal exactly when their forms are. `mul`
    is not 1 where a model joins the batch with heads or windows.
    """

    symbol: str
    # factories, since files hold these two always, and `mul` where it is not 1
    add: int = msgspec.field(default_factory=lambda: 0)
    div: int = msgspec.field(default_factory=lambda: 1)
    mul: int = 1

    def plus(self, n: int) -> Sym:
        return Sym(self.symbol, self.add + n * self.div, self.div, self.mul)

    def floordiv(self, n: int) -> Sym:
        shared = math.gcd(self.mul, n)  # floor((g*x + a) / (g*d)) = floor((x + floor(a/g)) / d)
        return Sym(self.symbol, self.add // shared, self.div * n // shared, self.mul // shared)

    def times(self, n: int) -> Sym | None:
        """None where the product has no such form: of a quotient, or by a number below 1."""
        if self.div > 1 or n < 1:
            return None
        return Sym(self.symbol, n * self.add, 1, n * self.mul)

    def joined(self, other: Sym) -> Sym | None:
        """The sum; None where it has no such form: of quotients, or of two symbols."""
        if self.symbol != other.symbol or self.div > 1 or other.div > 1:
            return None
        return Sym(self.symbol, self.add + other.add, 1, self.mul + other.mul)

    def minus(self, other: Sym) -> Sym | None:
        """The difference, as x - x // 2 = (x + 1) // 2; None where it has no such form."""
        mul = self.mul * other.div - other.mul
        if self.symbol != other.symbol or self.div > 1 or mul < 1:
            return None
        # M x + A - floor((m x + a) / d) = ceil(((M d - m) x + A d - a) / d)
        add = self.add * other.div - other.add + other.div - 1
        return Sym(self.symbol, add, 1, mul).floordiv(other.div)

    def at(self, value: int) -> int:
        return (self.mul * value + self.add) // self.div

    def __str__(self) -> str:
        text = self.symbol if self.mul == 1 else f"{self.mul}*{self.symbol}"
        text = text if not self.add else f"{text}{self.add:+d}"
        if self.div == 1:
            return text
        return f"({text})//{self.div}" if self.add else f"{text}//{self.div}"


Dim = int | Sym
Shape = tuple[Dim, ...]


class TensorSpec(msgspec.Struct, frozen=True):
    """Shape and element type of a value; a dimension is an integer or an expression in N, H, W."""

    shape: Shape
    dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def at(self, sizes: Mapping[str, Dim]) -> TensorSpec:
        """The same where these symbols have these values, or are other symbols."""
        shape = (_at(d, sizes.get(d.symbol)) if isinstance(d, Sym) else d for d in self.shape)
        return TensorSpec(tuple(shape), self.dtype)

    def __str__(self) -> str:
        return f"{_short(self.dtype)}[{', '.join(str(d) for d in self.shape)}]"


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    """The floating dtype of most bits, of 16 at least; None if there is none.

    fp32 where both fp16 and bf16 are, as PyTorch promotes them.
    """
    real = {d for d in dtypes if d.is_floating_point and d.itemsize > 1}
    return functools.reduce(torch.promote_types, real) if real else None


def _at(size: Sym, value: Dim | None) -> Dim:
    if isinstance(value, Sym):
        return Sym(value.symbol, size.add, size.div, size.mul)
    return size if value is None else size.at(value)


def _short(dtype: str) -> str:
    for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i")):
        if dtype.startswith(long):
            return short + dtype.removeprefix(long)
    return dtype


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), DTYPE_NAMES[tensor.dtype])
