"""Weights as kernels read them, in NumPy: what `backends/triton/running/pack.py` makes in PyTorch.

Bit for bit the same, which the tests compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastres.errors import ArtifactError
from fastres.kernels.epilogue import TF32_LIMIT
from fastres.kernels.geometry import mergeable

Array = np.ndarray[Any, np.dtype[Any]]
PLAIN = (np.ndarray, np.memmap)  # others, such as masked arrays, are more than their numbers
_TAPS, _FOLDED = 4, 16  # of a folded stem, as in fastres.kernels.folding
_ROWS = 16  # as in fastres.kernels.pairs


def bf16(values: Array) -> Array:
    """The nearest bfloat16, ties to even, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def tf32(values: Array) -> Array:
    """The nearest numbers of 10 bits behind the point: `fastres.kernels.reference.round_tf32`."""
    single = np.ascontiguousarray(values, np.float32)
    bits = single.view(np.uint32)
    nearest = (bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000
    return np.where(np.abs(single) < TF32_LIMIT, nearest.view(np.float32), single)


ROUND: Mapping[str, Callable[[Array], Array]] = {
    "fp32": lambda values: values.astype(np.float32),
    "tf32": tf32,
    "fp16": lambda values: values.astype(np.float16),
    "bf16": bf16,
    "int8": lambda values: values.astype(np.float16),  # of the layers that stay
}


class PackedArrays:
    """The constants of a graph by the keys of a linked plan.

    Args:
        constants: a graph's, by name: floats, or int8.
        precision: of the plan.
    """

    def __init__(self, constants: Callable[[str], Array], precision: str) -> None:
        self._constant = constants
        self._round = ROUND[precision]

    def get(self, key: Sequence[Any]) -> Array:
        """An array in one piece.

        Raises:
            ArtifactError: the key is none that plans have.
        """
        kind, *rest = key if key else ("nothing",)
        make = getattr(self, f"_{kind}", None) if str(kind) in _KINDS else None
        if make is None:
            raise ArtifactError(f"the plan reads {key}, which this fastres does not know")
        try:
            return np.ascontiguousarray(make(*rest))
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ArtifactError(f"the plan reads {key}, which cannot be: {error}") from error

    def _rounded(self, weight: Array) -> Array:
        return weight if weight.dtype == np.int8 else self._round(weight)

    def _filters(self, name: str) -> Array:
        return self._rounded(self._constant(name).transpose(0, 2, 3, 1))

    def _matrix(self, name: str, *projection: str) -> Array:
        if len(projection) > 1:
            raise ValueError(f"a matrix has one projection, not {len(projection)}")
        parts = [self._constant(n).transpose(0, 2, 3, 1) for n in (name, *projection)]
        return self._rounded(np.concatenate([part.reshape(len(part), -1) for part in parts], 1))

    def _interleaved(self, *names: str) -> Array:
        matrix = self._matrix(*names)
        pairs = matrix.reshape(len(matrix) // _ROWS, _ROWS // 2, 2, -1)
        return pairs.transpose(0, 2, 1, 3).reshape(matrix.shape)

    def _grouped(self, name: str, groups: float, merged: float) -> Array:
        groups, merged = int(groups), int(merged)
        filters = self._constant(name).transpose(0, 2, 3, 1)
        k, r, s, c = filters.shape
        if groups < 1 or k % groups or merged not in mergeable(groups, c):
            raise ValueError(f"{merged} of {groups} groups cannot be one product")
        each = filters.reshape(groups // merged, merged, k // groups, r, s, c)
        whole = np.zeros((*each.shape[:-1], merged, c), filters.dtype)
        for i in range(merged):
            whole[:, i, :, :, :, i] = each[:, i]
        return self._rounded(whole.reshape(k, r, s, merged * c))

    def _stem(self, name: str) -> Array:
        weight = self._constant(name)
        k, c = weight.shape[:2]
        eight = np.zeros((k, c, 8, 8), weight.dtype)
        eight[:, :, 1:, 1:] = weight
        packed = np.zeros((k, _TAPS, _TAPS, _FOLDED), weight.dtype)
        folded = eight.reshape(k, c, _TAPS, 2, _TAPS, 2).transpose(0, 2, 4, 1, 3, 5)
        packed[..., : 4 * c] = folded.reshape(k, _TAPS, _TAPS, 4 * c)
        return self._rounded(packed.reshape(k, -1))

    def _rows(self, name: str) -> Array:
        return self._rounded(self._constant(name))

    def _bias(self, *given: str | float) -> Array:
        names = [name for name in given if isinstance(name, str)]
        (factor,) = [x for x in given if not isinstance(x, str)] or [1.0]
        total = sum(self._constant(name).astype(np.float64) for name in names)
        return np.asarray(total * factor, np.float32)

    def _products(self, name: str, factor: float, result: float = 1.0) -> Array:
        return self._constant(name) * np.float32(factor) * np.float32(result)

    def _scale(self, *norm: Any) -> Array:
        return self._norm(*norm)[0]

    def _shift(self, *norm: Any) -> Array:
        return self._norm(*norm)[1]

    def _norm(
        self, mean: str, var: str, weight: str | None, bias: str | None, eps: float
    ) -> tuple[Array, Array]:
        wide = {
            name: self._constant(name).astype(np.float64)
            for name in (mean, var, weight, bias)
            if name is not None
        }
        scale = 1 / np.sqrt(wide[var] + eps)
        if weight is not None:
            scale = scale * wide[weight]
        shift = -wide[mean] * scale
        if bias is not None:
            shift = shift + wide[bias]
        return scale.astype(np.float32), shift.astype(np.float32)

    def _factors(self, *factors: float) -> Array:
        return np.asarray(factors, np.float32).reshape(2, 3)


_KINDS = (
    "filters",
    "matrix",
    "interleaved",
    "grouped",
    "stem",
    "rows",
    "bias",
    "products",
    "scale",
    "shift",
    "factors",
)
