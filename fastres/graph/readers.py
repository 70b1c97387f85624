"""ATen call → operation of the IR: one small reader per operator.

A reader returns an `Emit` (an operation with its operands), an `Alias` (the call changes nothing at
inference, such as dropout), or None: the IR has no such operation, the caller keeps it as `Aten`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch

from fastres.errors import CaptureError
from fastres.graph.calls import Alias, Call, Emit
from fastres.graph.ir import (
    Activation,
    Add,
    BatchNorm,
    Concat,
    Flatten,
    GlobalAvgPool,
    Mul,
    Op,
    Pad,
    Slice,
    Softmax,
)
from fastres.graph.readers_pools import (
    adaptive_avg_pool,
    adaptive_max_pool_part,
    avg_pool,
    max_pool,
    max_pool_part,
)
from fastres.graph.readers_products import conv2d, convolution, linear, product
from fastres.graph.symbols import is_fixed
from fastres.kernels.epilogue import ActivationKind

Reader = Callable[[Call], Emit | Alias | None]
PartReader = Callable[[Call, int], Emit | None]


def read(call: Call) -> Emit | Alias | None:
    """Reads one call; None where the IR has no operation for it."""
    reader = READERS.get(call.functional)
    return reader(call) if reader is not None else None


def read_part(call: Call, index: int) -> Emit | None:
    """Reads one of the several results of a call; None where the IR has no operation for it."""
    reader = PARTS.get(call.overload)
    return reader(call, index) if reader is not None else None


def _batch_norm(call: Call) -> Emit | None:
    if call.args.get("training") and not call.is_fixed(call.args["input"]):
        raise CaptureError(
            f"{call.node.name} normalises with the batch's own statistics (training mode, or "
            "track_running_stats=False); an engine needs running statistics"
        )
    params = call.params(weight="weight", bias="bias", mean="running_mean", var="running_var")
    if params is None or not {"mean", "var"} <= params.keys() or call.rank("input") not in (2, 4):
        return None
    eps = call.args["eps" if "eps" in call.args else "epsilon"]
    return Emit(BatchNorm(eps=eps), (call.value("input"),), params)


def _norm_part(call: Call, index: int) -> Emit | None:
    """The forms that return statistics as well."""
    return _batch_norm(call) if index == 0 else None


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


def _mean(call: Call) -> Emit | None:
    dims = call.args["dim"] or []
    if call.rank("self") != 4 or {d % 4 for d in dims} != {2, 3} or call.args["dtype"]:
        return None
    return Emit(GlobalAvgPool(keepdim=bool(call.args["keepdim"])), (call.value("self"),))


def _flatten(call: Call) -> Emit | None:
    """flatten, view and reshape, where they only join trailing dimensions."""
    before, after = call.shape("self"), call.node.meta["val"].shape
    start = len(after) - 1
    if start < 1 or len(after) > len(before):
        return None
    # by their expressions: with == a symbolic size equals the number that the example has
    if [str(size) for size in after[:start]] != [str(size) for size in before[:start]]:
        return None
    return Emit(Flatten(start), (call.value("self"),))


def _cat(call: Call) -> Emit | None:
    nodes = call.args["tensors"]
    if len({n.meta["val"].dtype for n in nodes}) != 1:
        return None
    rank = len(nodes[0].meta["val"].shape)
    return Emit(Concat(call.args["dim"] % rank), tuple(call.value_of(n) for n in nodes))


def _pad(call: Call) -> Emit | None:
    rank, pads = call.rank("self"), call.args["pad"]
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
    to_end = _is_end(stop, shape[dim])
    if (start, step) == (0, 1) and to_end:
        return Alias(call.args["self"])
    if not isinstance(shape[dim], int) and (start < 0 or not to_end):
        return None
    starts, stops, steps = [0] * len(shape), [None] * len(shape), [1] * len(shape)
    starts[dim], stops[dim], steps[dim] = start, None if to_end else stop, step
    return Emit(Slice(tuple(starts), tuple(stops), tuple(steps)), (call.value("self"),))


def _is_end(stop: int | None, size: int | torch.SymInt) -> bool:
    """Whether a slice that stops there goes to the end of a dimension."""
    beyond = size if isinstance(size, int) else torch.iinfo(torch.int32).max
    return stop is None or stop >= beyond


def _slice_scatter(call: Call) -> Alias | None:
    """Writes into a slice; functionalisation writes whole tensors so, too, but single images."""
    shape, dim = call.shape("self"), call.args["dim"] % len(call.shape("self"))
    start, stop, step = call.args["start"] or 0, call.args["end"], call.args["step"]
    numbers = all(isinstance(s, int | None) for s in (start, stop, step))
    whole = numbers and (start, step) == (0, 1) and _is_end(stop, shape[dim])
    source = call.args["src"]
    same = source.meta["val"].dtype == call.node.meta["val"].dtype
    return Alias(source, copies=True) if whole and same else None


def _piece(call: Call, index: int) -> Emit | None:
    """One of the pieces of chunk and split."""
    rank, dim = call.rank("self"), call.args["dim"] % call.rank("self")
    sizes = [piece.shape[dim] for piece in call.node.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    starts, stops = [0] * rank, [None] * rank
    starts[dim], stops[dim] = sum(sizes[:index]), sum(sizes[: index + 1])
    return Emit(Slice(tuple(starts), tuple(stops), (1,) * rank), (call.value("self"),))


def _bits(call: Call) -> Alias | None:
    """Memory read as another type: of floating-point numbers, only where the type is the same."""
    before, after = call.args["self"].meta["val"].dtype, call.args["dtype"]
    if before == after:
        return Alias(call.args["self"])
    if before.is_floating_point or after.is_floating_point:
        raise CaptureError(
            f"{call.node.name} reads the bits of {before} as {after}; an engine may compute in "
            "another precision. Convert the numbers, by x.to(...), or leave this out of the model"
        )
    return None


def _squeeze(call: Call) -> None:
    """Not an operation of the IR; but one that means something else for a batch of one."""
    shape = call.shape("self")
    dims = call.args.get("dim", range(len(shape)))
    for dim in [dims] if isinstance(dims, int) else dims:
        if not is_fixed(shape[dim]):
            raise CaptureError(
                f"{call.node.name} ({call.overload}) would also drop the batch, or another "
                "variable size, where it is 1; name the dimensions to drop, as in x.flatten(1)"
            )


def _softmax(call: Call) -> Emit | None:
    if call.args.get("dtype") is not None or call.args.get("half_to_float"):
        return None
    return Emit(Softmax(call.args["dim"]), (call.value("self"),))


def _dropout(call: Call) -> Alias | None:
    draws = call.args["train"] and call.args["p"]
    return None if draws else Alias(call.args["self" if call.mutates else "input"])


def _to(call: Call) -> Alias | None:
    """A conversion to the dtype that the tensor has; where it lies is the engine's business."""
    if call.args["self"].meta["val"].dtype != call.node.meta["val"].dtype:
        return None
    copies = call.short_name == "_to_copy" or bool(call.args.get("copy"))
    return Alias(call.args["self"], copies)


def _identity(call: Call) -> Alias:
    return Alias(call.args["self"])


def _clone(call: Call) -> Alias:
    return Alias(call.args["self"], copies=True)


READERS: dict[str, Reader] = {
    "aten.conv2d.default": conv2d,
    "aten.conv2d.padding": conv2d,
    "aten.convolution.default": convolution,
    "aten.batch_norm.default": _batch_norm,
    "aten.relu.default": _activation,
    "aten.silu.default": _activation,
    "aten.sigmoid.default": _activation,
    "aten.gelu.default": _activation,
    "aten.hardswish.default": _activation,
    "aten.add.Tensor": _binary(Add()),
    "aten.mul.Tensor": _binary(Mul()),
    "aten.max_pool2d.default": max_pool,
    "aten.avg_pool2d.default": avg_pool,
    "aten.adaptive_avg_pool2d.default": adaptive_avg_pool,
    "aten._adaptive_avg_pool2d.default": adaptive_avg_pool,
    "aten.mean.dim": _mean,
    "aten.linear.default": linear,
    "aten.addmm.default": product,
    "aten.mm.default": product,
    "aten.matmul.default": product,
    "aten.flatten.using_ints": _flatten,
    "aten.view.default": _flatten,
    "aten.reshape.default": _flatten,
    "aten.view.dtype": _bits,
    "aten.cat.default": _cat,
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _pad,
    "aten.slice.Tensor": _slice,
    "aten.slice_scatter.default": _slice_scatter,
    "aten.squeeze.default": _squeeze,
    "aten.squeeze.dim": _squeeze,
    "aten.squeeze.dims": _squeeze,
    "aten.softmax.int": _softmax,
    "aten._softmax.default": _softmax,
    "aten.dropout.default": _dropout,
    "aten.feature_dropout.default": _dropout,
    "aten.alpha_dropout.default": _dropout,
    "aten.feature_alpha_dropout.default": _dropout,
    "aten.alias.default": _identity,
    "aten.detach.default": _identity,
    "aten.contiguous.default": _identity,
    "aten.clone.default": _clone,
    "aten.lift_fresh_copy.default": _clone,
    "aten.to.dtype": _to,
    "aten.to.dtype_layout": _to,
    "aten.to.device": _to,
    "aten.to.other": _to,
    "aten._to_copy.default": _to,
    "aten.type_as.default": _to,
}

PARTS: dict[str, PartReader] = {
    "aten.chunk.default": _piece,
    "aten.split.Tensor": _piece,
    "aten.split_with_sizes.default": _piece,
    "aten.split.sizes": _piece,
    "aten._native_batch_norm_legit_no_training.default": _norm_part,
    "aten._batch_norm_no_update.default": _norm_part,
    "aten.native_batch_norm.default": _norm_part,
    "aten.cudnn_batch_norm.default": _norm_part,
    "aten.max_pool2d_with_indices.default": max_pool_part,
    "aten.adaptive_max_pool2d.default": adaptive_max_pool_part,
}
