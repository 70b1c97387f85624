"""Operations the IR does not know: kept as a call of a PyTorch overload, run by PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from fastres.errors import CaptureError, GraphError
from fastres.graph.ir import DTYPE_NAMES, DTYPES, Aten, TensorSpec


def resolve(overload: str) -> Callable[..., Any]:
    """The operator behind a name such as `aten.roll.default`.

    Only aten operators are resolved: the name may come from a file.
    """
    parts = overload.split(".")
    if len(parts) != 3 or parts[0] != "aten":
        raise GraphError(f"{overload!r} is not of the form aten.NAME.OVERLOAD")
    packet = getattr(torch.ops.aten, parts[1], None)
    operator = getattr(packet, parts[2], None) if packet is not None else None
    if operator is None or operator._schema.is_mutable:
        raise GraphError(f"{overload!r} is no pure operator of PyTorch {torch.__version__}")
    return operator  # type: ignore[no-any-return]


def call(op: Aten, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Runs the operator on tensors of any device (meta tensors to learn the result's shape)."""
    args = [_decode(a, inputs) for a in msgspec.json.decode(op.args)]
    kwargs = {k: _decode(a, inputs) for k, a in msgspec.json.decode(op.kwargs).items()}
    result = resolve(op.overload)(*args, **kwargs)
    if not isinstance(result, torch.Tensor):
        raise GraphError(f"{op.overload} returns {type(result).__name__}, not one tensor")
    return result


def encode(
    overload: str,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    index_of: Callable[[Any], int | None],
    result: TensorSpec,
) -> Aten:
    """Writes a call down; `index_of` gives the position of a tensor argument among the inputs.

    Raises:
        CaptureError: an argument is neither a tensor nor a plain constant.
    """
    encoded = [_encode(overload, a, index_of) for a in args]
    named = {k: _encode(overload, a, index_of) for k, a in kwargs.items()}
    to_text = msgspec.json.encode
    return Aten(overload, to_text(encoded).decode(), to_text(named).decode(), result)


def _encode(overload: str, arg: Any, index_of: Callable[[Any], int | None]) -> Any:
    index = index_of(arg)
    if index is not None:
        return {"input": index}
    if arg is None or isinstance(arg, bool | int | float | str):
        return arg
    if isinstance(arg, list | tuple):
        return [_encode(overload, a, index_of) for a in arg]
    if isinstance(arg, torch.dtype) and arg in DTYPE_NAMES:
        return {"dtype": DTYPE_NAMES[arg]}
    if isinstance(arg, torch.device):
        return {"device": str(arg)}
    raise CaptureError(
        f"{overload} is called with {arg!r} ({type(arg).__name__}), which cannot be written down; "
        "supported are tensors, numbers, strings, dtypes and lists of these. If it is a size "
        "that depends on the input, fix H and W or rewrite that line of the model"
    )


def _decode(arg: Any, inputs: Sequence[torch.Tensor]) -> Any:
    if isinstance(arg, list):
        return [_decode(a, inputs) for a in arg]
    if isinstance(arg, dict):
        if "input" in arg:
            return inputs[arg["input"]]
        return DTYPES[arg["dtype"]] if "dtype" in arg else torch.device(arg["device"])
    return arg
