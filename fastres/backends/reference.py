"""The meaning of a graph: every node through `fastres.kernels.reference`, in float32 or float64."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from fastres.backends.base import HERE_ONLY, Account, CompiledParts, NodeTime, Refusal
from fastres.calib.table import CalibrationTable
from fastres.deadlines import Deadline
from fastres.errors import InputError, first_line
from fastres.graph import aten
from fastres.graph.export import no_autocast
from fastres.graph.ir import (
    Activation,
    Add,
    Aten,
    AvgPool,
    BatchNorm,
    Concat,
    Conv2d,
    Dequantize,
    Flatten,
    GlobalAvgPool,
    Graph,
    Linear,
    MaxPool,
    Mul,
    Node,
    Normalize,
    Pad,
    Quantize,
    Slice,
    Softmax,
)
from fastres.graph.passes.quantise import eight_bits, quantise
from fastres.kernels import reference as meaning
from fastres.options import EIGHT_BITS, PRECISION_OF, Options, Precision, Sizes

See = Callable[[str, torch.Tensor], object]


def _unseen(name: str, value: torch.Tensor) -> None:
    """What is shown to nobody."""


class ReferenceBackend:
    """Correct and slow; the oracle for every other backend."""

    name = "reference"
    checked = False

    def unavailable(
        self, target: str | None = None, compiled: CompiledParts | None = None
    ) -> str | None:
        if target is not None:
            return HERE_ONLY
        return None

    def precision(self, wanted: Precision) -> str | None:
        known = wanted in ("fp32", *EIGHT_BITS)
        return None if known else f"reference computes in fp32, int8 and fp8, not {wanted}"

    def quantise(self, graph: Graph, table: CalibrationTable, precision: Precision) -> Graph:
        return quantise(graph, table, "skip", eight_bits(precision))

    def refusals(self, graph: Graph) -> tuple[Refusal, ...]:
        return ()

    def lower(
        self,
        graph: Graph,
        options: Options,
        shapes: tuple[Sizes, ...],
        compiled: CompiledParts | None = None,
    ) -> ReferenceExecutable:
        return ReferenceExecutable(graph, torch.float32)

    def device(self, options: Options) -> torch.device:
        return torch.device("cpu")


class ReferenceExecutable:
    """Walks the graph node by node in PyTorch.

    Args:
        graph: lawful.
        dtype: in which every node computes; float64 for an oracle. Unless all weights have it, it
            also takes the place of the floating dtypes that ATen calls name.
        device: where the constants lie and the inputs come from.
    """

    def __init__(
        self, graph: Graph, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self._graph = graph
        self._dtype = dtype
        named = {t.dtype for t in graph.constants.values() if _is_real(t)}
        self._instead = None if (named or {graph.floating_dtype}) == {dtype} else dtype
        self._constants = {
            name: tensor.to(device, dtype) if _is_real(tensor) else tensor.to(device)
            for name, tensor in graph.constants.items()
        }
        self._last_use = _last_uses(graph)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self._run(inputs)

    def run_until(self, inputs: Sequence[torch.Tensor], deadline: Deadline) -> list[torch.Tensor]:
        """As `run`; asks for the time after each node."""
        return self._run(inputs, lambda name, value: deadline.left())

    def values(self, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every node's value, in the executable's own dtype."""
        return self._walk(inputs, keep=None)

    def visit(self, inputs: Sequence[torch.Tensor], see: See) -> None:
        """Shows every input and node's value once, and keeps none."""
        self._walk(inputs, keep=(), see=see)

    def precisions(self) -> dict[str, str]:
        name = "fp64" if self._dtype == torch.float64 else PRECISION_OF[self._dtype]
        whole = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
        return {
            node.name: whole[self._constants[node.params["weight"]].dtype]
            if "scale" in node.params
            else name
            for node in self._graph.nodes
        }

    def profile(self, inputs: Sequence[torch.Tensor]) -> list[NodeTime]:
        times: list[NodeTime] = []
        self._walk(inputs, keep=self._graph.outputs, times=times)
        return times

    def account(self) -> Account:
        return Account()

    def compiled(self) -> CompiledParts:
        return CompiledParts()

    def _run(self, inputs: Sequence[torch.Tensor], see: See = _unseen) -> list[torch.Tensor]:
        values = self._walk(inputs, keep=self._graph.outputs, see=see)
        specs = [self._graph.spec(name) for name in self._graph.outputs]
        return [
            values[name].to(spec.torch_dtype, copy=True)
            for name, spec in zip(self._graph.outputs, specs, strict=True)
        ]

    @torch.no_grad()
    @no_autocast()
    def _walk(
        self,
        inputs: Sequence[torch.Tensor],
        keep: Sequence[str] | None,
        times: list[NodeTime] | None = None,
        see: See = _unseen,
    ) -> dict[str, torch.Tensor]:
        values = {
            value.name: tensor.to(self._dtype) if tensor.is_floating_point() else tensor
            for value, tensor in zip(self._graph.inputs, inputs, strict=True)
        }
        for name, value in values.items():
            see(name, value)
        for node in self._graph.nodes:
            start = time.perf_counter()
            values[node.name] = evaluate(node, values, self._constants, self._instead)
            see(node.name, values[node.name])
            if times is not None:
                spent = 1e3 * (time.perf_counter() - start)
                times.append(NodeTime(node.name, spent, "pytorch"))
            if keep is not None:
                for name in self._last_use[node.name]:
                    if name not in keep:
                        del values[name]
        return values


def _is_real(tensor: torch.Tensor) -> bool:
    """Whether it is floating point, and no weight of 8 bits."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _last_uses(graph: Graph) -> dict[str, list[str]]:
    """For each node, the values that nothing after it reads."""
    uses: dict[str, list[str]] = {node.name: [] for node in graph.nodes}
    seen: set[str] = set()
    for node in reversed(graph.nodes):
        for name in (*node.inputs, *node.params.values(), node.name):
            if name not in seen and name not in graph.constants:
                seen.add(name)
                uses[node.name].append(name)
    return uses


def evaluate(
    node: Node,
    values: Mapping[str, torch.Tensor],
    constants: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """One node's value from the values it reads; `dtype` is for `fastres.graph.aten.call`."""

    def operand(name: str) -> torch.Tensor:
        return values[name] if name in values else constants[name]

    inputs = [operand(name) for name in node.inputs]
    params = {slot: operand(name) for slot, name in node.params.items()}
    if "scale" in params:
        scale = params["scale"]
        params["weight"] = meaning.dequantise(params["weight"], scale, scale.dtype)
    if isinstance(node.op, Aten):
        try:
            return aten.call(node.op, inputs, dtype)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise InputError(
                f"{node.name} ({node.op.overload}) cannot compute with these values: "
                f"{first_line(error)}"
            ) from error
    if isinstance(node.op, Normalize):
        op, made = node.op, dtype or node.spec.torch_dtype
        return meaning.normalize(inputs[0], op.mean, op.std, op.scale, op.flip, made)
    if isinstance(node.op, Quantize):  # kept as floating-point numbers: NaN is not lost
        return meaning.saturated(inputs[0] / node.op.scale, node.spec.torch_dtype)
    return _EVALUATE[type(node.op)](node.op, inputs, params)


Tensors = Sequence[torch.Tensor]
Params = Mapping[str, torch.Tensor]


def _conv2d(op: Conv2d, inputs: Tensors, params: Params) -> torch.Tensor:
    return meaning.conv2d(
        inputs[0],
        params["weight"],
        params.get("bias"),
        stride=op.stride,
        padding=op.padding,
        dilation=op.dilation,
        groups=op.groups,
        residual=inputs[1] if op.epilogue.residual else None,
        activation=op.epilogue.activation,
    )


def _batch_norm(op: BatchNorm, inputs: Tensors, params: Params) -> torch.Tensor:
    return meaning.batch_norm(
        inputs[0],
        params.get("weight"),
        params.get("bias"),
        params["mean"],
        params["var"],
        op.eps,
        op.activation,
    )


def _max_pool(op: MaxPool, inputs: Tensors, params: Params) -> torch.Tensor:
    return meaning.max_pool(inputs[0], op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode)


def _avg_pool(op: AvgPool, inputs: Tensors, params: Params) -> torch.Tensor:
    return meaning.avg_pool(
        inputs[0], op.kernel, op.stride, op.padding, op.ceil_mode, op.count_include_pad
    )


def _linear(op: Linear, inputs: Tensors, params: Params) -> torch.Tensor:
    return meaning.linear(inputs[0], params["weight"], params.get("bias"), op.activation)


_EVALUATE: dict[type, Callable[..., torch.Tensor]] = {
    Conv2d: _conv2d,
    BatchNorm: _batch_norm,
    Activation: lambda op, x, _: meaning.activation(x[0], op.kind),
    Add: lambda op, x, _: meaning.add(x[0], x[1], op.activation),
    Mul: lambda op, x, _: meaning.mul(x[0], x[1]),
    MaxPool: _max_pool,
    AvgPool: _avg_pool,
    GlobalAvgPool: lambda op, x, _: meaning.global_avg_pool(x[0], op.keepdim),
    Linear: _linear,
    Flatten: lambda op, x, _: meaning.flatten(x[0], op.start_dim),
    Concat: lambda op, x, _: meaning.concat(x, op.dim),
    Pad: lambda op, x, _: meaning.pad(x[0], op.before, op.after, op.value),
    Slice: lambda op, x, _: meaning.slice_(x[0], op.starts, op.stops, op.steps),
    Softmax: lambda op, x, _: meaning.softmax(x[0], op.dim),
    Dequantize: lambda op, x, _: x[0] * op.scale,
}
