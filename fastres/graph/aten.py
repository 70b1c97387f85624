"""Operations the IR does not know: kept as a call of a PyTorch overload, run by PyTorch."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch

from fastres.errors import CaptureError, GraphError
from fastres.graph import operators
from fastres.graph.ir import Aten
from fastres.graph.specs import DTYPE_NAMES, DTYPES, Shape, TensorSpec

_MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "preserve": torch.preserve_format,
    "channels_last": torch.channels_last,
}
_FORMAT_NAMES = {value: name for name, value in _MEMORY_FORMATS.items()}


READ_MEMORY = ("as_strided", "as_strided_copy", "as_strided_scatter")
# Operators whose first operand is laid out contiguous before them, as the IR has no strides: those
# that read its memory, and those that refuse it where dimensions cannot be joined without a copy.
_CONTIGUOUS = (
    *READ_MEMORY,
    *("view", "_unsafe_view", "view_as", "view_copy", "_reshape_alias", "_reshape_copy"),
)


class InputOf(msgspec.Struct, frozen=True):
    """Stands in a call for its i-th tensor."""

    input: int


class SizeOf(msgspec.Struct, frozen=True):
    """Stands in a call for a size that depends on its inputs: floor((mul * size + add) / div)."""

    input: int
    dim: int
    add: int = 0
    div: int = 1
    mul: int = 1

    def at(self, size: int) -> int:
        return (self.mul * size + self.add) // self.div

    @property
    def is_plain_batch(self) -> bool:
        return (self.dim, self.add, self.div, self.mul) == (0, 0, 1, 1)


# what kinds of arguments are written as, of those that PyTorch would take a number for
_OF_KIND = {"ScalarType": "dtype", "MemoryFormat": "memory_format", "Layout": "layout"}
_DEEPEST, _LONGEST, _FARTHEST = 4, 4096, 2**63
_MOST_MADE = 2**30  # bytes


def check(name: str, op: Aten, inputs: int) -> None:
    """What `call` takes for granted, because `encode` wrote it, but a file can say otherwise.

    Args:
        name: of the node.
        inputs: how many values it reads.

    Raises:
        GraphError: the operator is none that a saved engine may call, or its arguments are not
            written as `encode` does.
    """
    operator = resolve(op.overload)
    reason = operators.refusal(operator)
    if reason is not None:
        raise GraphError(f"{name} calls {op.overload}, which no saved engine may: {reason}")
    kinds = _check_arguments(name, op, inputs)
    wanted = "input" if operators.takes_tensors(operator) else "size"
    if not any(wanted in found for found in kinds):
        raise GraphError(f"{name} calls {op.overload} with no {wanted} of a value of the graph")
    if op.index is not None and not 0 <= op.index < _LONGEST:
        raise GraphError(f"{name} stands for result {op.index} of {op.overload}")


def _check_arguments(name: str, op: Aten, inputs: int) -> list[set[str]]:
    """The kinds of what each argument holds, if all are written as `encode` does."""
    try:
        given = msgspec.json.decode(op.args, type=list[Any])
        named = msgspec.json.decode(op.kwargs, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise GraphError(f"{name} has arguments that cannot be read: {error}") from error
    schema = resolve(op.overload)._schema
    arguments = {each.name: str(each.real_type) for each in schema.arguments}
    if len(given) > len(arguments) or not set(named) <= set(arguments):
        raise GraphError(f"{name} calls {op.overload} with other arguments than it takes")
    kinds = []
    for argument, arg in (*zip(arguments, given, strict=False), *named.items()):
        found = _check(name, arg, inputs, 0)
        kinds.append(found)
        word = next((w for kind, w in _OF_KIND.items() if kind in arguments[argument]), None)
        if word is not None and arg is not None and found != {word}:  # PyTorch takes any number
            raise GraphError(f"{name} calls {op.overload} with {argument} {reprlib.repr(arg)}")
    return kinds


def _check(name: str, arg: Any, inputs: int, depth: int) -> set[str]:
    """The kinds of what an argument holds."""
    if isinstance(arg, list):
        if depth == _DEEPEST or len(arg) > _LONGEST:
            raise GraphError(f"{name} has an argument of {len(arg)} items, nested {depth} deep")
        return set().union(*(_check(name, each, inputs, depth + 1) for each in arg))
    if isinstance(arg, int) and not -_FARTHEST <= arg < _FARTHEST:
        raise GraphError(f"{name} has the argument {arg}; numbers have 64 bits")
    if not isinstance(arg, dict):
        return set()
    kind, value = next(iter(arg.items()), ("", None))
    numbers: list[Any] = value if isinstance(value, list) else [value]
    whole = all(type(n) is int and abs(n) < 2**31 for n in numbers)
    fits = {
        "input": whole and len(numbers) == 1 and 0 <= numbers[0] < inputs,
        "size": whole
        and len(numbers) in (4, 5)
        and 0 <= numbers[0] < inputs
        and min(numbers[1], *(n - 1 for n in numbers[3:])) >= 0,
        "float": value in ("inf", "-inf", "nan"),
        "dtype": isinstance(value, str) and value in DTYPES,
        "device": isinstance(value, str),
        "memory_format": isinstance(value, str) and value in _MEMORY_FORMATS,
        "layout": value == "strided",
    }
    if len(arg) != 1 or not fits.get(kind, False):
        raise GraphError(
            f"{name} has the argument {reprlib.repr(arg)}, which no engine is saved with"
        )
    return {kind}


def resolve(overload: str) -> torch._ops.OpOverload[..., Any]:
    """The operator behind a name such as `aten.roll.default`.

    Only aten operators are resolved: the name may come from a file.

    Raises:
        GraphError: another form of name, no such operator, or one that writes to its arguments.
    """
    parts = overload.split(".")
    if len(parts) != 3 or parts[0] != "aten":
        raise GraphError(f"{overload!r} is not of the form aten.NAME.OVERLOAD")
    packet = getattr(torch.ops.aten, parts[1], None)
    operator = getattr(packet, parts[2], None) if packet is not None else None
    if not isinstance(operator, torch._ops.OpOverload) or operator._schema.is_mutable:
        raise GraphError(f"{overload!r} is no pure operator of PyTorch {torch.__version__}")
    return operator


def is_known(op: Aten) -> bool:
    """Whether the meta device tells the shape of its result, and is safe to be asked."""
    operator = resolve(op.overload)
    return operators.refusal(operator) is None and not operators.same_as_first(operator)


def call(
    op: Aten, inputs: Sequence[torch.Tensor], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Runs the operator on tensors of any device (meta tensors to learn the result's shape).

    A device that the call names gives way to that of its inputs; a floating dtype that it names
    gives way to `dtype`, in which the whole graph is being run.

    Raises:
        GraphError: an argument or result is of a kind that no engine is saved with, meta tensors
            are given to an operator that may crash with them, or numbers alone would make a tensor
            of more than a gibibyte.
    """
    asked = any(tensor.is_meta for tensor in inputs)
    if asked and not is_known(op):
        raise GraphError(f"{op.overload} is not asked on the meta device")
    if asked or not inputs:
        _check_arguments("a call", op, len(inputs))
    if not inputs and not operators.gives_tensors(resolve(op.overload)):
        raise GraphError(f"{op.overload} makes no tensor")  # of numbers: division by 0 is a crash

    def written(arg: Any) -> Any:
        value = _decode(arg, inputs)
        floating = isinstance(value, torch.dtype) and value.is_floating_point
        return dtype if floating and dtype is not None else value

    args = [written(a) for a in msgspec.json.decode(op.args)]
    kwargs = {k: written(a) for k, a in msgspec.json.decode(op.kwargs).items()}
    if op.overload.split(".")[1] in _CONTIGUOUS and args and isinstance(args[0], torch.Tensor):
        args[0] = args[0].contiguous()
    if not inputs:
        _check_size(op, args, kwargs)
    result = resolve(op.overload)(*args, **kwargs)
    several = isinstance(result, tuple | list)
    if several and op.index is not None and op.index < len(result):
        result = result[op.index]
    if not isinstance(result, torch.Tensor) or several != (op.index is not None):
        raise GraphError(f"{op.overload} returns {type(result).__name__}, not one tensor")
    return result


def made(name: str, op: Aten) -> torch.Tensor:
    """What a call of a model makes of numbers alone.

    Raises:
        CaptureError: as `call`.
    """
    try:
        with torch.no_grad():
            return call(op, ())
    except GraphError as error:
        raise CaptureError(f"{name}: {error}") from error


def _check_size(op: Aten, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Of what numbers alone make: the meta device is asked first."""
    if "device" not in {argument.name for argument in resolve(op.overload)._schema.arguments}:
        return
    made = resolve(op.overload)(*args, **{**kwargs, "device": "meta"})
    if isinstance(made, torch.Tensor) and made.nbytes > _MOST_MADE:
        raise GraphError(
            f"{op.overload} makes {made.nbytes} bytes of numbers alone; up to {_MOST_MADE} are "
            "made so. Register the tensor as a buffer of the model"
        )


def with_known_sizes(
    op: Aten, shapes: Sequence[Shape], result: TensorSpec
) -> tuple[Aten, list[int]]:
    """The call with numbers for the sizes that it takes from its inputs, where those are known.

    Args:
        shapes: of the inputs.

    Returns:
        The call, and which of the inputs it still reads, in order.
    """
    read: list[int] = []

    def place(index: int) -> int:
        if index not in read:
            read.append(index)
        return read.index(index)

    def written(arg: Any) -> Any:
        if isinstance(arg, list):
            return [written(a) for a in arg]
        if isinstance(arg, dict) and "input" in arg:
            return {"input": place(arg["input"])}
        if isinstance(arg, dict) and "size" in arg:
            index, dim, *form = arg["size"]
            size = shapes[index][dim]
            if isinstance(size, int):
                return SizeOf(index, dim, *form).at(size)
            return {"size": [place(index), dim, *form]}
        return arg

    args = [written(arg) for arg in msgspec.json.decode(op.args)]
    kwargs = {name: written(arg) for name, arg in msgspec.json.decode(op.kwargs).items()}
    text, named = (msgspec.json.encode(given).decode() for given in (args, kwargs))
    return Aten(op.overload, text, named, result, op.index), read


def reads_batch(op: Aten) -> bool:
    """Whether the call computes with the size of a first dimension, or works along one.

    A plain first dimension is left out where it begins a list, as in x.view(x.size(0), -1), and so
    is a permutation, which names all dimensions.
    """
    names = [argument.name for argument in resolve(op.overload)._schema.arguments]
    named = dict(zip(names, msgspec.json.decode(op.args), strict=False))
    named |= msgspec.json.decode(op.kwargs)
    rank = len(op.result.shape)

    def computes(arg: Any) -> bool:
        if isinstance(arg, list):
            rest = arg[1:] if arg and _is_plain_batch(arg[0]) else arg
            return any(computes(a) for a in rest)
        return isinstance(arg, dict) and "size" in arg and arg["size"][1] == 0

    def along(arg: Any) -> bool:
        dims = arg if isinstance(arg, list) else [arg]
        return any(isinstance(d, int) and d in (0, -rank) for d in dims)

    return any(
        (name in ("dim", "dims") and along(arg) and "permute" not in op.overload) or computes(arg)
        for name, arg in named.items()
        if name != "N"  # of images, each of which native_group_norm normalises by itself
    )


def _is_plain_batch(arg: Any) -> bool:
    return isinstance(arg, dict) and "size" in arg and SizeOf(*arg["size"]).is_plain_batch


def encode(
    overload: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    result: TensorSpec,
    index: int | None = None,
) -> Aten:
    """Writes a call down; tensors and sizes among the arguments are `InputOf` and `SizeOf`.

    Args:
        index: which of its results is meant, where it returns several.

    Raises:
        CaptureError: an argument is neither of these nor a plain constant.
    """
    encoded = [_encode(overload, a) for a in args]
    named = {k: _encode(overload, a) for k, a in kwargs.items()}
    to_text = msgspec.json.encode
    return Aten(overload, to_text(encoded).decode(), to_text(named).decode(), result, index)


def _encode(overload: str, arg: Any) -> Any:
    if isinstance(arg, InputOf):
        return {"input": arg.input}
    if isinstance(arg, SizeOf):
        *form, mul = msgspec.structs.astuple(arg)
        return {"size": form if mul == 1 else [*form, mul]}
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"float": str(arg)}  # JSON has no such number
    if arg is None or isinstance(arg, bool | int | float | str):
        return arg
    if isinstance(arg, list | tuple):
        return [_encode(overload, a) for a in arg]
    if isinstance(arg, torch.dtype) and arg in DTYPE_NAMES:
        return {"dtype": DTYPE_NAMES[arg]}
    if isinstance(arg, torch.device):
        return {"device": str(arg)}
    if isinstance(arg, torch.memory_format) and arg in _FORMAT_NAMES:
        return {"memory_format": _FORMAT_NAMES[arg]}
    if arg is torch.strided:
        return {"layout": "strided"}
    raise CaptureError(
        f"{overload} is called with {arg!r} ({type(arg).__name__}), which cannot be written down; "
        "supported are tensors, numbers, strings, dtypes, sizes of the form (k*N + a) // b, and "
        "lists of these. Rewrite that line of the model: fix H and W where it computes with them, "
        "and take a tensor itself in place of its item()"
    )


def _decode(arg: Any, inputs: Sequence[torch.Tensor]) -> Any:
    if isinstance(arg, list):
        return [_decode(a, inputs) for a in arg]
    if not isinstance(arg, dict):
        return arg
    ((kind, value),) = arg.items()
    match kind:
        case "input":
            return inputs[value]
        case "size":
            index, dim, *form = value
            return SizeOf(index, dim, *form).at(inputs[index].shape[dim])
        case "float":
            return float(value)
        case "dtype":
            return DTYPES[value]
        case "device":
            return inputs[0].device if inputs else torch.device(value)
        case "memory_format":
            return _MEMORY_FORMATS[value]
        case "layout" if value == "strided":
            return torch.strided
    raise GraphError(f"a call is written with {arg!r}, which this version of fastres does not know")
