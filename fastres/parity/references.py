"""What a candidate is compared with: the untouched model, or the meaning of a graph.

A reference runs in any dtype: float64 as the oracle, the candidate's own as the baseline whose
error sets the bound.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree

from fastres.backends.reference import ReferenceExecutable
from fastres.errors import InputError
from fastres.graph.capture import Captured, capture
from fastres.graph.copies import copied
from fastres.graph.export import TORCH_STATE, no_autocast
from fastres.graph.hooks import check_hooks
from fastres.graph.ir import Graph, Node, Normalize
from fastres.graph.specs import widest
from fastres.options import Input
from fastres.parity import oracle
from fastres.parity.other_dtypes import InDtype

Tensors = Sequence[torch.Tensor]
_SWITCHES = (  # torch.backends.<first>.<second>.fp32_precision
    ("cuda", "matmul"),
    ("cudnn", "conv"),
    ("cudnn", "rnn"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
)


class Reference(Protocol):
    """Runs the reference in a dtype of one's choice."""

    name: str
    dtype: torch.dtype

    def run(self, inputs: Tensors, dtype: torch.dtype) -> Any:
        """What the model returns, its own pytree."""

    def walk(self, inputs: Tensors, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Every value by its captured name, in order; use each before asking for the next.

        The caller iterates inside `full_precision()`.
        """

    def values(
        self, inputs: Tensors, dtype: torch.dtype, names: Collection[str]
    ) -> dict[str, torch.Tensor]:
        """Some of these values, to keep."""


class ModelReference:
    """A PyTorch model, called as it is; for its inner values, its exported program is walked.

    Args:
        model: in eval mode; copied, never changed.
        inputs: how to export it, should inner values be asked for.

    Raises:
        InputError: the model is in training mode.
        CaptureError: it has a forward hook that is no part of it.
    """

    def __init__(self, model: torch.nn.Module, inputs: Sequence[Input]) -> None:
        check_hooks(model)
        if not hasattr(model, "training"):  # gone with torch.jit.freeze
            raise InputError(
                "the reference was frozen by TorchScript and cannot run in float64: give the "
                "module that it was made from"
            )
        if any(module.training for module in model.modules()):
            raise InputError("the reference is in training mode: call model.eval() first")
        self.name = type(model).__name__
        parameters = list(model.parameters())
        self.dtype = widest(p.dtype for p in parameters) or torch.float32
        self._device = parameters[0].device if parameters else torch.device("cpu")
        self._model = model
        self._inputs = inputs
        self._copies: dict[torch.dtype, torch.nn.Module] = {}
        self._captured: Captured | None = None

    @torch.no_grad()
    def run(self, inputs: Tensors, dtype: torch.dtype) -> Any:
        if dtype not in self._copies:
            other = None if dtype == self.dtype else dtype
            self._copies[dtype] = copied(self._model, dtype=other)
        cast = [  # copied: the model may change its inputs in place
            x.to(self._device, dtype if x.is_floating_point() else None, copy=True) for x in inputs
        ]
        with full_precision(), nullcontext() if dtype == self.dtype else InDtype(dtype, self.dtype):
            return self._copies[dtype](*cast)

    def walk(self, inputs: Tensors, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        return oracle.walk(self._program(), inputs, dtype=dtype)

    def values(
        self, inputs: Tensors, dtype: torch.dtype, names: Collection[str]
    ) -> dict[str, torch.Tensor]:
        program = self._program()
        with full_precision():
            return oracle.activations(program, inputs, dtype=dtype, names=names)

    def _program(self) -> Captured:
        if self._captured is None:
            self._captured = capture(self._model, self._inputs)
        return self._captured


class PictureReference:
    """A reference of a model without the normalisation, fed decoded pictures [N, 3, H, W].

    They are normalised in float64 and rounded once, to the dtype it runs in.

    Args:
        inner: what takes the normalised pictures.
        node: the engine's Normalize.
    """

    def __init__(self, inner: Reference, node: Node) -> None:
        assert isinstance(node.op, Normalize)
        self.name, self.dtype = inner.name, inner.dtype
        self._inner, self._node, self._op = inner, node, node.op

    def run(self, inputs: Tensors, dtype: torch.dtype) -> Any:
        return self._inner.run([self._normalised(inputs)], dtype)

    def walk(self, inputs: Tensors, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        x = self._normalised(inputs)
        rest = self._inner.walk([x], dtype)  # exports the model now, not when it is asked for
        return chain([(self._node.origins[-1], x.to(dtype))], rest)

    def values(
        self, inputs: Tensors, dtype: torch.dtype, names: Collection[str]
    ) -> dict[str, torch.Tensor]:
        x, own = self._normalised(inputs), self._node.origins[-1]
        found = self._inner.values([x], dtype, set(names) - {own})
        return found | ({own: x.to(dtype)} if own in names else {})

    def _normalised(self, inputs: Tensors) -> torch.Tensor:
        (x,), op = inputs, self._op
        mean, std = (x.new_tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (op.mean, op.std))
        return ((x.flip(1) if op.flip else x).double() * op.scale - mean) / std


class GraphReference:
    """A graph through PyTorch's own operations, node by node, on the CPU."""

    def __init__(self, graph: Graph) -> None:
        self.name = f"graph of {len(graph.nodes)} nodes"
        self.dtype = graph.floating_dtype
        self._graph = graph
        self._executables: dict[torch.dtype, ReferenceExecutable] = {}

    def run(self, inputs: Tensors, dtype: torch.dtype) -> Any:
        values, tree = self._all(inputs, dtype), self._graph.output_tree
        return pytree.tree_unflatten([values[name] for name in self._graph.outputs], tree)

    def walk(self, inputs: Tensors, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        values = self._all(inputs, dtype)
        return ((node.origins[-1], values[node.name]) for node in self._graph.nodes)

    def values(
        self, inputs: Tensors, dtype: torch.dtype, names: Collection[str]
    ) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.walk(inputs, dtype) if name in names}

    def nodes(
        self, inputs: Tensors, dtype: torch.dtype, names: Mapping[str, str]
    ) -> dict[str, torch.Tensor]:
        """Values of nodes, by other names: `names` maps those to nodes."""
        values = self._all(inputs, dtype)
        return {other: values[name] for other, name in names.items()}

    def _all(self, inputs: Tensors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        if dtype not in self._executables:
            self._executables[dtype] = ReferenceExecutable(self._graph, dtype)
        with full_precision():
            return self._executables[dtype].values([x.cpu() for x in inputs])


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, PyTorch's fp32 is fp32: no TF32, no bf16 products, no autocast.

    These are global switches of PyTorch: one thread at a time has them, and sets them back on
    leaving. `torch.export` fails inside: it asks for cuDNN's TF32 setting by its old name, which
    PyTorch refuses once the new ones are in use.
    """
    with TORCH_STATE:
        switches = [getattr(getattr(torch.backends, backend), op) for backend, op in _SWITCHES]
        before = [switch.fp32_precision for switch in switches]
        try:
            for switch in switches:
                switch.fp32_precision = "ieee"
            with no_autocast():
                yield
        finally:
            for switch, setting in zip(switches, before, strict=True):
                switch.fp32_precision = setting
