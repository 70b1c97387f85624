"""Weights in the layout and dtype that the kernels read: KRSC convolutions, fp32 biases."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import cast

import msgspec
import torch

from fastres.backends.triton.planning.plan import Norm
from fastres.backends.triton.running.linked import Key
from fastres.errors import UnsupportedError
from fastres.graph.ir import Graph, Normalize
from fastres.kernels.folding import pack_stem_weight
from fastres.kernels.geometry import mergeable
from fastres.kernels.pairs import interleaved
from fastres.kernels.reference import round_tf32
from fastres.weights import is_finite

_RANKS = dict.fromkeys(("filters", "grouped", "matrix", "interleaved", "stem"), 4) | {"rows": 2}
_RANKS |= dict.fromkeys(("bias", "scale", "shift", "products"), 1)


class Packed:
    """The constants of a graph as kernels read them, each made when it is first asked for.

    Weights are rounded once to `dtype`, quantised ones stay; biases stay fp32, they are added to
    the fp32 accumulator. Any number of threads may ask.

    Args:
        device: where the tensors are to lie; "meta" for tensors that are only to be compiled for.
        tf32: whether fp32 weights are rounded to TF32, for products of that.

    Raises:
        UnsupportedError: a weight is beyond fp16's range.
    """

    def __init__(
        self, graph: Graph, dtype: torch.dtype, device: torch.device, *, tf32: bool = False
    ) -> None:
        self._constants = graph.constants
        self._dtype = dtype
        self._tf32 = tf32
        self._device = device
        self._made: dict[Key, torch.Tensor] = {}
        self._lock = threading.Lock()
        if dtype == torch.float16:
            _check_range(graph)

    def filters(self, name: str) -> torch.Tensor:
        """[K, R, S, C/groups] of a convolution's [K, C/groups, R, S]."""
        return self._once(
            ("filters", name),
            lambda: self._rounded(self._constants[name].permute(0, 2, 3, 1)),
        )

    def grouped(self, name: str, groups: int, merged: int) -> torch.Tensor:
        """[K, R, S, merged * C/groups] of a grouped convolution, some groups in one product.

        Each filter holds zeros for the channels of the other groups.

        Raises:
            ValueError: the filters are not of so many groups.
        """
        k, c = self._constants[name].shape[:2]
        if groups < 1 or k % groups or merged not in mergeable(groups, c):
            raise ValueError(f"{merged} of {groups} groups of {name} cannot be one product")

        def make() -> torch.Tensor:
            filters = self._constants[name].permute(0, 2, 3, 1)
            r, s = filters.shape[1:3]
            each = filters.reshape(groups // merged, merged, k // groups, r, s, c)
            whole = each.new_zeros(*each.shape[:-1], merged, c)
            for i in range(merged):
                whole[:, i, :, :, :, i] = each[:, i]
            return self._rounded(whole.reshape(k, r, s, merged * c))

        return self._once(("grouped", name, groups, merged), make)

    def matrix(self, name: str, projection: str | None = None) -> torch.Tensor:
        """[K, R*S*C], and behind it the columns [K, C2] of a 1x1 projection."""
        if projection is None:
            return self.filters(name).flatten(1)
        names = (name, projection)
        return self._once(("matrix", *names), lambda: self._rounded(self._joined(names)))

    def interleaved(self, name: str, projection: str | None = None) -> torch.Tensor:
        """`matrix` as boxes and chains read it: rows of 8 bits interleaved.

        Raises:
            ValueError: there are no pairs of rows (`fastres.kernels.pairs`).
        """
        if self._constants[name].dtype.itemsize > 1:
            return self.matrix(name, projection)
        names = (name,) if projection is None else (name, projection)
        return self._once(
            ("interleaved", *names), lambda: self._rounded(interleaved(self._joined(names)))
        )

    def stem(self, name: str) -> torch.Tensor:
        """[K, 256] of a 7x7 stem, folded as its picture is (`fastres.kernels.stem`)."""
        return self._once(
            ("stem", name), lambda: self._rounded(pack_stem_weight(self._constants[name]))
        )

    def rows(self, name: str) -> torch.Tensor:
        """[K, C] of a linear layer."""
        return self._once(("rows", name), lambda: self._rounded(self._constants[name]))

    def bias(self, names: Sequence[str | None], factor: float = 1.0) -> torch.Tensor | None:
        """[K] fp32, the sum of the biases named, times a factor; None if there are none."""
        present = tuple(name for name in names if name is not None)
        if not present:
            return None

        def make() -> torch.Tensor:
            total = sum(self._constants[name].double() for name in present)
            assert isinstance(total, torch.Tensor)
            return (total * factor).to(self._device, torch.float32).contiguous()

        key = ("bias", *present)
        return self._once(key if factor == 1.0 else (*key, factor), make)

    def narrow_bias(self, name: str) -> torch.Tensor:
        """[K] in the weights' type, as PyTorch's own convolutions take it.

        Raises:
            ValueError: it is beyond the range of that.
        """

        def make() -> torch.Tensor:
            narrow = self._constants[name].to(self._device, self._dtype).contiguous()
            if not is_finite(narrow):
                raise ValueError(f"the bias {name} is beyond the range of {self._dtype}")
            return narrow

        return self._once(("narrow", name), make)

    def products(self, name: str, factor: float, result: float = 1.0) -> torch.Tensor:
        """[K] fp32: what a product of 8 bits stands for, by output channel, times `result`.

        Args:
            name: of the weight's scales.
            factor: the scale of what is multiplied.
            result: 1 / the result's scale, where nothing stands between the two.
        """
        key = ("products", name, factor)
        return self._once(
            key if result == 1.0 else (*key, result),
            lambda: (self._constants[name] * torch.tensor(factor) * torch.tensor(result)).to(
                self._device, torch.float32
            ),
        )

    def scale_and_shift(self, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        """[C] fp32 each: a BatchNorm as x * scale + shift, worked out in float64."""
        mean, var = (self._constants[name].double() for name in (norm.mean, norm.var))
        scale = (var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * self._constants[norm.weight].double()
        shift = -mean * scale
        if norm.bias is not None:
            shift = shift + self._constants[norm.bias].double()
        key = (norm.mean, norm.var, norm.weight, norm.bias, norm.eps)
        return (
            self._once(("scale", *key), lambda: scale.to(self._device, torch.float32)),
            self._once(("shift", *key), lambda: shift.to(self._device, torch.float32)),
        )

    def factors(self, normalize: Normalize) -> torch.Tensor:
        """[2, 3] fp32: what a picture's channels are multiplied by, and what is added."""
        a, b = normalize.factors
        return self._factors((*a, *b))

    def made(self) -> dict[Key, torch.Tensor]:
        """All that was made so far, by keys that `get` takes."""
        with self._lock:
            return dict(self._made)

    def get(self, key: Key) -> torch.Tensor:
        """What the methods above make, by the name of the method and the constants it reads.

        Raises:
            ValueError: there are no such constants.
        """
        try:
            return self._named(key)
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, RuntimeError, TypeError, msgspec.MsgspecError) as error:
            raise ValueError(f"{key} stands for no constants of this graph: {error}") from error

    def _named(self, key: Key) -> torch.Tensor:
        kind, *rest = key if key else (None,)
        if kind == "factors" and len(rest) == 6 and all(isinstance(x, float) for x in rest):
            return self._factors(cast(tuple[float, ...], tuple(rest)))
        names = [name for name in rest if isinstance(name, str)]
        found = [self._constants[name].dim() for name in names if name in self._constants]
        if kind not in _RANKS or not names or found != [_RANKS[str(kind)]] * len(names):
            raise ValueError(f"{key} stands for no constants of this graph")
        if kind in ("scale", "shift"):
            mean, var, weight, bias, eps = rest
            norm = msgspec.convert(
                dict(mean=mean, var=var, weight=weight, bias=bias, eps=eps), Norm
            )
            return self.scale_and_shift(norm)[kind == "shift"]
        if kind == "grouped":
            counts = [n for n in rest[1:] if isinstance(n, float | int) and n == int(n)]
            groups, merged = map(int, counts)
            return self.grouped(names[0], groups, merged)
        numbers = [x for x in rest if isinstance(x, float)]
        if kind == "products" and len(names) == 1 and len(numbers) in (1, 2):
            return self.products(names[0], *numbers)
        if kind == "bias" and len(numbers) < 2:
            total = self.bias(names, *numbers)
            assert total is not None
            return total
        make = {
            "filters": self.filters,
            "matrix": self.matrix,
            "interleaved": self.interleaved,
            "stem": self.stem,
            "rows": self.rows,
        }
        if kind not in make:
            raise ValueError(f"{key} stands for no constants of this graph")
        return make[str(kind)](*names)

    @property
    def nbytes(self) -> int:
        """Of all that was made so far."""
        with self._lock:
            return sum(tensor.nbytes for tensor in self._made.values())

    def _factors(self, factors: tuple[float, ...]) -> torch.Tensor:
        def make() -> torch.Tensor:
            return torch.tensor(factors, dtype=torch.float32).view(2, 3).to(self._device)

        return self._once(("factors", *factors), make)

    def _joined(self, names: Sequence[str]) -> torch.Tensor:
        """The matrices of filters side by side, as they are stored."""
        return torch.cat([self._constants[n].permute(0, 2, 3, 1).flatten(1) for n in names], 1)

    def _rounded(self, weight: torch.Tensor) -> torch.Tensor:
        dtype = weight.dtype if weight.dtype.itemsize == 1 else self._dtype
        packed = weight.to(self._device, dtype).contiguous()
        return round_tf32(packed) if self._tf32 and dtype == torch.float32 else packed

    def _once(self, key: Key, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            return self._made[key]


def _check_range(graph: Graph) -> None:
    """Biases stay fp32, and so do what normalises and scales."""
    for node in graph.nodes:
        weight = graph.constants[node.params["weight"]] if "weight" in node.params else None
        if weight is not None and weight.dtype.itemsize > 1 and not is_finite(weight.half()):
            raise UnsupportedError(
                f"{node.name}: its weights, with BatchNorm folded in, exceed fp16's 65504; use "
                "precision='bf16' or 'fp32'"
            )
