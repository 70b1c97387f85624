"""What a graph from a file would take, before anything of it is run: shapes, memory and work.

Operators of PyTorch are called on the meta device, where tensors have sizes and no values; a call
that is made of others is watched, so what it is made of counts and is bounded, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastres.errors import GraphError
from fastres.graph import aten, operators
from fastres.graph.cost import multiply_adds
from fastres.graph.ir import Aten, AvgPool, Graph, MaxPool, Node
from fastres.graph.shapes import bind, node_shape
from fastres.graph.specs import DTYPE_NAMES, Sym
from fastres.options import Sizes

_MOVED = 16  # operations that a value costs that is only brought, compared or written
_MOST_CALLS = 10_000  # that one operator may be made of
_MOST_RESULTS = 16_384  # that a call may give: no operand of one that gives a list is longer


class Need(NamedTuple):
    """Of one run: bytes of all that is there at once, and operations, a multiplication with its
    addition being one."""

    bytes: int
    operations: int


class _Found(NamedTuple):
    """What one node gives, and bytes and operations that it takes meanwhile."""

    shape: Sizes
    dtype: str
    aside: int
    operations: int


def need(graph: Graph, input_shapes: Sequence[Sequence[int]]) -> Need:
    """What a run of the graph takes.

    Raises:
        GraphError: a node does not take its operands, may not be called, or gives something else
            than it claims.
    """
    shapes: dict[str, Sizes] = bind(graph, input_shapes)
    symbols = {
        dim.symbol: size
        for value in graph.inputs
        for dim, size in zip(value.spec.shape, shapes[value.name], strict=True)
        if isinstance(dim, Sym)
    }
    readers = {name: len(nodes) for name, nodes in graph.users().items()}
    held = {v.name: _bytes(shapes[v.name], v.spec.torch_dtype) for v in graph.inputs}
    most = alive = sum(held.values())
    operations = 0
    for node in graph.nodes:
        found = _found(graph, node, shapes)
        claimed = node.spec.at(symbols)
        if (found.shape, found.dtype) != (claimed.shape, claimed.dtype):
            raise GraphError(
                f"{node.name} claims {claimed}, it gives {found.dtype} {list(found.shape)}"
            )
        shapes[node.name] = found.shape
        held[node.name] = _bytes(found.shape, node.spec.torch_dtype)
        alive += held[node.name]
        most = max(most, alive + found.aside)
        operations += found.operations
        for name in dict.fromkeys((*node.inputs, node.name)):
            readers[name] = readers.get(name, 0) - node.inputs.count(name)
            if readers[name] <= 0 and name not in graph.outputs:
                alive -= held.pop(name, 0)
    return Need(most, operations)


def _found(graph: Graph, node: Node, shapes: Mapping[str, Sizes]) -> _Found:
    operands = [shapes[n] if n in shapes else tuple(graph.constants[n].shape) for n in node.inputs]
    if isinstance(node.op, Aten):
        return _called(graph, node, node.op, operands)
    shape: Any = node_shape(graph, node, shapes)
    count = math.prod(shape)
    work = _MOVED * (sum(map(math.prod, operands)) + count)
    if isinstance(node.op, MaxPool | AvgPool):
        work += _MOVED * count * math.prod(node.op.kernel)
    sizes: Any = {**shapes, node.name: shape}
    return _Found(shape, node.spec.dtype, 0, work + multiply_adds(node, sizes, graph))


def _called(graph: Graph, node: Node, op: Aten, operands: Sequence[Sizes]) -> _Found:
    operator = aten.resolve(op.overload)
    several = any("List" in str(each.type) for each in operator._schema.returns)
    if several and any(d > _MOST_RESULTS for shape in operands for d in shape):
        raise GraphError(f"{node.name} ({op.overload}) could give more than {_MOST_RESULTS} values")
    if any(0 in shape for shape in operands):  # some of PyTorch's operators refuse that
        return _Found(tuple(op.result.shape), op.result.dtype, 0, 0)  # type: ignore[arg-type]
    tensors = [
        torch.empty(shape, dtype=graph.spec(name).torch_dtype, device="meta")
        for name, shape in zip(node.inputs, operands, strict=True)
    ]
    watch = _Watch()  # type: ignore[no-untyped-call]
    if operators.same_as_first(operator):
        result = tensors[0]
    else:
        result = _asked(node, op, tensors, watch)
    if result.layout is not torch.strided or result.dtype not in DTYPE_NAMES:
        raise GraphError(f"{node.name} ({op.overload}) gives a tensor of another kind")
    shape = tuple(result.shape)
    work = watch.operations + _MOVED * (sum(x.numel() for x in tensors) + result.numel())
    return _Found(shape, DTYPE_NAMES[result.dtype], watch.bytes, work)


def _asked(node: Node, op: Aten, tensors: Sequence[torch.Tensor], watch: _Watch) -> torch.Tensor:
    try:
        with watch, torch.no_grad():
            return aten.call(op, tensors)
    except GraphError as error:
        raise GraphError(f"{node.name}: {error}") from error
    except Exception as error:  # PyTorch raises many kinds where a call does not fit
        why = str(error).strip().partition("\n")[0][:200]
        raise GraphError(f"{node.name} ({op.overload}) is refused by PyTorch: {why}") from error


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what a call on meta tensors is made of."""

    calls = bytes = operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        if self.calls > _MOST_CALLS:
            raise GraphError(f"it is made of more than {_MOST_CALLS} calls")
        if operators.draws(func, args, kwargs or {}):
            raise GraphError(f"{func} draws random numbers")
        result = func(*args, **(kwargs or {}))
        made = [x for x in _tensors(result) if not func.is_view]
        self.bytes += sum(x.numel() * x.itemsize for x in made)
        count = sum(x.numel() for x in made)
        self.operations += _MOVED * count * max(1, math.prod(_window(func, args)))
        self.operations += _multiplications(func._opname, args, count)
        return result


_PRODUCTS = {
    "mm": 0,
    "bmm": 0,
    "mv": 0,
    "dot": 0,
    "addmm": 1,
    "baddbmm": 1,
    "addbmm": 1,
    "addmv": 1,
}


def _multiplications(name: str, args: tuple[Any, ...], count: int) -> int:
    """Of the operators that have more of them than results; `count` is how many those are.

    All others are made of these, as `linear` and `einsum`, before they are counted.
    """
    if name in _PRODUCTS:
        a, b = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
        return int(a.numel() * (b.shape[-1] if b.dim() > 1 else 1))
    if name in ("convolution", "_convolution"):
        x, weight, transposed = args[0], args[1], args[6]
        return int((x.numel() if transposed else count) * math.prod(weight.shape[1:]))
    if name.startswith("_scaled_dot_product"):  # of queries and keys, and with the values
        return int(2 * args[0].numel() * args[1].shape[-2])
    if name in ("_cdist_forward", "_pdist_forward", "_euclidean_dist"):
        return int(_MOVED * count * args[0].shape[-1])
    return 0


def _tensors(result: Any) -> list[torch.Tensor]:
    parts = result if isinstance(result, tuple | list) else (result,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _window(func: Any, args: tuple[Any, ...]) -> Sequence[int]:
    """What a pool goes over for each of its results."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)).get("kernel_size", ())
    return given if isinstance(given, tuple | list) else ()


def _bytes(shape: Sizes, dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
