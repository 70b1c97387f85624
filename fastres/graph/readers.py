"""How each ATen call reads as an operation of the IR: one small reader per operator.

A reader returns an `Emit` (an operation with its operands), an `Alias` (the call changes nothing at
inference, such as dropout), or None: the IR has no such operation, the caller keeps it as `Aten`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
import torch.fx

from fastres.errors import CaptureError
from fastres.graph.ir import (
    Activation,
    Add,
    AvgPool,
    BatchNorm,
    Concat,
    Conv2d,
    Flatten,
    GlobalAvgPool,
    Linear,
    MaxPool,
    Mul,
    Op,
    Pad,
    Pair,
    Slice,
    Softmax,
)
from fastres.kernels.epilogue import ActivationKind


class Emit(NamedTuple):
    """An operation, the values it reads, and its parameters by slot."""

    op: Op
    inputs: tuple[str, ...]
    params: dict[str, str] = {}


class Alias(NamedTuple):
    """The call returns this very value, in the same storage or (`copies`) in its own."""

    node: torch.fx.Node
    copies: bool = False


class Call:
    """One ATen call with its arguments by name, defaults filled in from the operator's schema."""

    def __init__(
        self,
        node: torch.fx.Node,
        value_of: Callable[[torch.fx.Node], str],
        constant: Callable[[torch.fx.Node], torch.Tensor | None],
    ) -> None:
        self.node = node
        self.value_of = value_of
        self.constant = constant
        target: Any = node.target
        if not isinstance(target, torch._ops.OpOverload):
            raise CaptureError(f"{target} ({node.name}) is no operator of PyTorch")
        self.schema = target._schema
        self.overload = str(target)
        self.args: dict[str, Any] = {a.name: a.default_value for a in self.schema.arguments}
        names = [a.name for a in self.schema.arguments]
        self.args.update(zip(names, node.args, strict=False))
        self.args.update(node.kwargs)

    @property
    def functional(self) -> str:
        """The overload's name without the underscore of its in-place form."""
        space, name, overload = self.overload.split(".")
        inplace = self.schema.is_mutable and name.endswith("_")
        return f"{space}.{name[:-1] if inplace else name}.{overload}"

    @property
    def short_name(self) -> str:
        return self.functional.split(".")[1]

    @property
    def mutates(self) -> torch.fx.Node | None:
        """The argument that an in-place call writes to."""
        for argument in self.schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                return self.args[argument.name]  # type: ignore[no-any-return]
        return None

    @property
    def is_view(self) -> bool:
        """Whether the result may share memory with an argument (reshape and flatten may)."""
        declared = any(r.alias_info is not None for r in self.schema.returns)
        return declared or self.short_name in ("reshape", "flatten", "contiguous", "to")

    def shape(self, name: str) -> torch.Size:
        return self.args[name].meta["val"].shape  # type: ignore[no-any-return]

    def value(self, name: str) -> str:
        return self.value_of(self.args[name])

    def is_tensor(self, name: str) -> bool:
        return isinstance(self.args[name], torch.fx.Node) and isinstance(
            self.args[name].meta.get("val"), torch.Tensor
        )

    def pair(self, name: str) -> Pair:
        value = self.args[name]
        items = [value] if isinstance(value, int) else list(value)
        return (items[0], items[-1])

    def params(self, **slots: str) -> dict[str, str] | None:
        """Slot → constant; None if one of them is computed rather than a constant."""
        found = {}
        for slot, name in slots.items():
            node = self.args[name]
            if node is None:
                continue
            if self.constant(node) is None:
                return None
            found[slot] = self.value_of(node)
        return found


Reader = Callable[[Call], Emit | Alias | None]


def read(call: Call) -> Emit | Alias | None:
    """Reads one call; None where the IR has no operation for it."""
    reader = READERS.get(call.functional)
    return reader(call) if reader is not None else None


def _conv2d(call: Call) -> Emit | None:
    params = call.params(weight="weight", bias="bias")
    if params is None or not isinstance(call.args["padding"], list | tuple):
        return None
    op = Conv2d(
        call.pair("stride"), call.pair("padding"), call.pair("dilation"), call.args["groups"]
    )
    return Emit(op, (call.value("input"),), params)


def _convolution(call: Call) -> Emit | None:
    is_2d = len(call.shape("input")) == 4 and not call.args["transposed"]
    return _conv2d(call) if is_2d else None


def _batch_norm(call: Call) -> Emit | None:
    if call.args["training"]:
        raise CaptureError(
            f"{call.node.name} normalises with the batch's own statistics (training mode, or "
            "track_running_stats=False); an engine needs running statistics"
        )
    params = call.params(weight="weight", bias="bias", mean="running_mean", var="running_var")
    if params is None or len(call.shape("input")) != 4:
        return None
    return Emit(BatchNorm(eps=call.args["eps"]), (call.value("input"),), params)


def _activation(call: Call) -> Emit | None:
    kind = call.short_name
    if kind not in get_args(ActivationKind) or call.args.get("approximate", "none") != "none":
        return None
    return Emit(Activation(kind), (call.value("self"),))  # type: ignore[arg-type]


def _binary(op: Op) -> Reader:
    def reader(call: Call) -> Emit | None:
        if not call.is_tensor("other") or call.args.get("alpha", 1) != 1:
            return None
        if call.args["self"].meta["val"].dtype != call.args["other"].meta["val"].dtype:
            return None
        return Emit(op, (call.value("self"), call.value("other")))

    return reader


def _max_pool(call: Call) -> Emit:
    stride = call.pair("stride") if call.args["stride"] else call.pair("kernel_size")
    op = MaxPool(
        call.pair("kernel_size"),
        stride,
        call.pair("padding"),
        call.pair("dilation"),
        call.args["ceil_mode"],
    )
    return Emit(op, (call.value("self"),))


def _avg_pool(call: Call) -> Emit | None:
    if call.args["divisor_override"] is not None:
        return None
    stride = call.pair("stride") if call.args["stride"] else call.pair("kernel_size")
    op = AvgPool(
        call.pair("kernel_size"),
        stride,
        call.pair("padding"),
        call.args["ceil_mode"],
        call.args["count_include_pad"],
    )
    return Emit(op, (call.value("self"),))


def _adaptive_avg_pool(call: Call) -> Emit | None:
    out = call.pair("output_size")
    sizes = call.shape("self")[2:]
    if len(call.shape("self")) != 4:
        return None
    if out == (1, 1):
        return Emit(GlobalAvgPool(keepdim=True), (call.value("self"),))
    if not all(isinstance(s, int) and s % o == 0 for s, o in zip(sizes, out, strict=True)):
        return None
    window = (sizes[0] // out[0], sizes[1] // out[1])
    return Emit(AvgPool(window, window), (call.value("self"),))


def _mean(call: Call) -> Emit | None:
    dims = call.args["dim"] or []
    if len(call.shape("self")) != 4 or {d % 4 for d in dims} != {2, 3} or call.args["dtype"]:
        return None
    return Emit(GlobalAvgPool(keepdim=bool(call.args["keepdim"])), (call.value("self"),))


def _linear(call: Call) -> Emit | None:
    params = call.params(weight="weight", bias="bias")
    return None if params is None else Emit(Linear(), (call.value("input"),), params)


def _flatten(call: Call) -> Emit | None:
    """flatten, view and reshape, where they only join trailing dimensions."""
    before, after = call.shape("self"), call.node.meta["val"].shape
    start = len(after) - 1
    if start < 1 or len(after) > len(before) or list(after[:start]) != list(before[:start]):
        return None
    return Emit(Flatten(start), (call.value("self"),))


def _cat(call: Call) -> Emit | None:
    nodes = call.args["tensors"]
    if len({n.meta["val"].dtype for n in nodes}) != 1:
        return None
    rank = len(nodes[0].meta["val"].shape)
    return Emit(Concat(call.args["dim"] % rank), tuple(call.value_of(n) for n in nodes))


def _pad(call: Call) -> Emit | None:
    rank, pads = len(call.shape("self")), call.args["pad"]
    if call.args.get("mode", "constant") != "constant" or not all(
        isinstance(p, int) and p >= 0 for p in pads
    ):
        return None
    before, after = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):  # from the last dimension on
        before[rank - 1 - i], after[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    op = Pad(tuple(before), tuple(after), float(call.args["value"] or 0.0))
    return Emit(op, (call.value("self"),))


def _slice(call: Call) -> Emit | Alias | None:
    shape, dim = call.shape("self"), call.args["dim"] % len(call.shape("self"))
    start, stop, step = call.args["start"] or 0, call.args["end"], call.args["step"]
    if not all(isinstance(s, int | None) for s in (start, stop, step)):
        return None
    to_end = stop is None or stop >= torch.iinfo(torch.int32).max
    if isinstance(shape[dim], int) and stop is not None:
        to_end = to_end or stop >= shape[dim]
    if (start, step) == (0, 1) and to_end:
        return Alias(call.args["self"])
    if not isinstance(shape[dim], int) and (start < 0 or not to_end):
        return None
    starts, stops, steps = [0] * len(shape), [None] * len(shape), [1] * len(shape)
    starts[dim], stops[dim], steps[dim] = start, None if to_end else stop, step
    return Emit(Slice(tuple(starts), tuple(stops), tuple(steps)), (call.value("self"),))


def _softmax(call: Call) -> Emit | None:
    if call.args.get("dtype") is not None or call.args.get("half_to_float"):
        return None
    return Emit(Softmax(call.args["dim"]), (call.value("self"),))


def _identity_in_eval(call: Call) -> Alias | None:
    return None if call.args["train"] and call.args["p"] else Alias(call.args["input"])


def _identity(call: Call) -> Alias:
    return Alias(call.args["self"])


def _clone(call: Call) -> Alias:
    return Alias(call.args["self"], copies=True)


READERS: dict[str, Reader] = {
    "aten.conv2d.default": _conv2d,
    "aten.convolution.default": _convolution,
    "aten.batch_norm.default": _batch_norm,
    "aten.relu.default": _activation,
    "aten.silu.default": _activation,
    "aten.sigmoid.default": _activation,
    "aten.gelu.default": _activation,
    "aten.hardswish.default": _activation,
    "aten.add.Tensor": _binary(Add()),
    "aten.mul.Tensor": _binary(Mul()),
    "aten.max_pool2d.default": _max_pool,
    "aten.avg_pool2d.default": _avg_pool,
    "aten.adaptive_avg_pool2d.default": _adaptive_avg_pool,
    "aten.mean.dim": _mean,
    "aten.linear.default": _linear,
    "aten.flatten.using_ints": _flatten,
    "aten.view.default": _flatten,
    "aten.reshape.default": _flatten,
    "aten.cat.default": _cat,
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _pad,
    "aten.slice.Tensor": _slice,
    "aten.softmax.int": _softmax,
    "aten._softmax.default": _softmax,
    "aten.dropout.default": _identity_in_eval,
    "aten.feature_dropout.default": _identity_in_eval,
    "aten.alias.default": _identity,
    "aten.detach.default": _identity,
    "aten.contiguous.default": _identity,
    "aten.clone.default": _clone,
}
