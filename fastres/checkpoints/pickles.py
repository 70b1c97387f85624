"""What a pickle of torch.save asks for, counted without making any of it.

torch.load with weights_only=True runs nothing of a file, but makes what the file says: tensors of
any size out of a storage of one number, bytes that are not there, keys that take for ever to hash.
Here the same instructions are followed with stand-ins for everything that they make.

Source: torch/_weights_only_unpickler.py for the instructions; torch/_utils.py for their functions.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import torch

MOST_STEPS = 1 << 20  # of a pickle: some thirty for each tensor
MOST_TENSORS = 12_000  # ResNet-1202 has 7,217 weights, and half as many momenta
_MOST_DIMS = 64  # that PyTorch takes
_KEY = 64  # numbers and texts in the key of a table
_LAST_PROTOCOL = 3  # of pickle, that torch.load reads with weights_only=True
_OLD_NAMES = {"long": "int", "unicode": "str", "xrange": "range"}  # which torch.save writes
_ITEM_SIZES = {  # of the elements of a storage, by its class
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Byte", "Char", "Bool", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4"), 1),
    "Untyped": 1,
    "ComplexDouble": 16,
}
_VIEWS = {  # functions that make a tensor of a storage, an offset, sizes and strides
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_qtensor",
}
_TYPED_VIEW = "torch._utils._rebuild_tensor_v3"  # whose dtype is not that of the storage
_WRAPPED = "torch._tensor._rebuild_from_type_v2"  # a call of another function, with attributes
_COPY = "torch._utils._rebuild_device_tensor_from_cpu_tensor"
_PARAMETERS = {
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
}
_OTHER_TENSORS = {  # which take no memory of their own, whatever their sizes
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_sparse_tensor",
}
_PLAIN = {"builtins.complex", "torch.Size", "torch.device", "torch.serialization._get_layout"}
_TABLES = {"builtins.set", "collections.Counter", "collections.OrderedDict"}
_BYTES = {"_codecs.encode", "builtins.bytearray"}
_CODECS = {"latin1", "latin-1", "ascii", "utf-8"}


class TooMuch(Exception):
    """It asks for more than weights need, and is not read on."""


class _Odd(Exception):
    """Likewise, in a noun; the rest is still looked through for names."""


@dataclass(frozen=True)
class Storage:
    """Bytes of the file that tensors look at."""

    key: str
    item_size: int
    count: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.item_size * self.count


@dataclass(frozen=True)
class _Global:
    """A class or function."""

    name: str


@dataclass(slots=True)
class _Object:
    """Stands for anything else that is made: a table, or what somebody's class makes."""

    entries: int = 0


@dataclass(frozen=True, slots=True)
class _Tensor:
    """Stands for a tensor."""

    elements: int


@dataclass
class Request:
    """What one or several pickles ask for.

    Args:
        objects: names of all classes and functions that are mentioned.
        storages: by their keys.
        tensors: how many are made.
        named: how many names in tables are those of tensors, of which several may be one.
        size: bytes of all tensors, each counted as if it shared nothing.
        refusal: what nothing is to be made of; empty if there is no such thing.
    """

    objects: set[str] = field(default_factory=set)
    storages: dict[str, Storage] = field(default_factory=dict)
    tensors: int = 0
    named: int = 0
    size: int = 0
    refusal: str = ""


class Reader:
    """Follows the instructions of pickles.

    Args:
        free: whether what has this name may be called with anything, as what stands in for it, or
            a class of the user's, is trusted with that.
    """

    def __init__(self, free: Callable[[str], bool]) -> None:
        self.asked = Request()
        self._free = free
        self._steps = 0
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # what lay below each mark
        self._memo: dict[int, Any] = {}

    def read(self, pickled: bytes | IO[bytes]) -> Any:
        """Follows one pickle to its end; gives what it makes, or what stands for that.

        Raises:
            TooMuch: it has too many instructions, or cannot be read without running it.
            ValueError: it is no pickle.
        """
        self._stack, self._marked, self._memo = [], [], {}
        argument: Any
        for operation, argument, _ in pickletools.genops(pickled):
            self._steps += 1
            if self._steps > MOST_STEPS:
                raise TooMuch(
                    f"has a pickle of more than {MOST_STEPS} steps, many times what networks need"
                )
            if operation.name == "PROTO" and argument > _LAST_PROTOCOL:
                raise TooMuch(
                    f"was written with pickle's protocol {argument}, which cannot be read without "
                    "running it: save it without pickle_protocol"
                )
            if operation.name == "GLOBAL":
                argument = _full_name(argument)
                self.asked.objects.add(argument)
            if self.asked.refusal:  # only names are of interest any more
                continue
            try:
                self._follow(operation.name, argument)
            except _Odd as odd:
                self.asked.refusal = str(odd)
            except (LookupError, TypeError, ValueError, AttributeError):
                self.asked.refusal = "steps that cannot be followed"
        return self._stack[-1] if self._stack and not self.asked.refusal else None

    def _follow(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(argument)
            case "GLOBAL":
                stack.append(_Global(argument))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_DICT" | "EMPTY_SET":
                stack.append(_Object())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "MARK":
                self._marked.append(stack)
                self._stack = []
            case "TUPLE":
                self._since_mark()
                self._stack.append(tuple(stack))
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if name == "APPEND" else self._since_mark()
                if isinstance(self._stack[-1], list):  # else a stand-in, which keeps nothing
                    self._stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._since_mark()
                _check_keys(items[::2])
                self._stack[-1].entries += len(items) // 2
                self.asked.named += sum(isinstance(value, _Tensor) for value in items[1::2])
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(self._call(stack.pop(), arguments, new=name == "NEWOBJ"))
            case "BUILD":
                self._spend(stack.pop())
                if not isinstance(stack[-1], _Object):
                    raise _Odd("a tensor that is changed after it was made")
            case "PROTO" | "STOP":
                pass
            case _:
                raise _Odd(f"the instruction {name}")

    def _since_mark(self) -> list[Any]:
        """What was put down since the last mark, which is taken away with it."""
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _storage(self, key: Any) -> Storage:
        """A storage by what torch.save calls it; the last of six parts is a view, long gone."""
        kind, of, name, _, count, *view = key
        item_size = _ITEM_SIZES[of.name.rpartition(".")[2].removesuffix("Storage")]
        sound = kind == "storage" and isinstance(name, str) and view in ([], [None])
        if not (sound and _is_count(count)):
            raise _Odd("a storage that is none")
        storage = Storage(name, item_size, count)
        if self.asked.storages.setdefault(name, storage) != storage:
            raise _Odd("two sizes for one storage")
        return storage

    def _spend(self, *given: Any) -> None:
        """A call takes as long as what it is given, which may be given to many calls."""
        for value in given:
            if isinstance(value, tuple):
                self._spend(*value)
            elif isinstance(value, str | list):
                self._steps += len(value) // 64
            elif isinstance(value, _Object):
                self._steps += value.entries
            self._steps += 1

    def _call(self, function: Any, arguments: Any, *, new: bool) -> Any:
        name = function.name
        self._spend(*arguments)
        if self._free(name):
            return _Object()
        if new and name not in ("collections.OrderedDict", "torch.nn.parameter.Parameter"):
            raise _Odd(f"a new {name}")
        first: Any = arguments[0] if arguments else None
        if name in _PARAMETERS:
            return _Tensor(first.elements)
        if name in _VIEWS:
            return self._view(name, *arguments)
        if name == _WRAPPED:
            return self._call(first, arguments[2], new=False)
        if name == _COPY:
            return self._tensor(first.elements, 16)
        if name in _OTHER_TENSORS:
            return self._tensor(0, 0)
        sound = not any(isinstance(given, Storage | _Tensor) for given in arguments)
        if name in _TABLES:
            _check_keys([i[0] if isinstance(i, list) else i for a in arguments for i in _items(a)])
        elif name in _BYTES:
            sound &= set(arguments[1:]) <= _CODECS and isinstance(first, str | _Object | None)
        else:
            sound &= name in _PLAIN
        if not sound:
            raise _Odd(f"a call of {name}")
        return _Object()

    def _view(
        self, name: str, storage: Any, offset: Any, sizes: Any, strides: Any, *rest: Any
    ) -> _Tensor:
        """A tensor, if it lies within its storage."""
        item_size = storage.item_size
        if name == _TYPED_VIEW:
            item_size = getattr(torch, rest[2].name.removeprefix("torch.")).itemsize
        if not (isinstance(sizes, tuple) and isinstance(strides, tuple)):
            raise _Odd("a tensor with sizes that are none")
        numbers = (offset, *sizes, *strides)
        if (
            len(sizes) != len(strides)
            or len(sizes) > _MOST_DIMS
            or not all(map(_is_count, numbers))
        ):
            raise _Odd("a tensor with sizes that are none")
        elements = math.prod(sizes)
        steps = zip(sizes, strides, strict=True)
        end = offset + sum((size - 1) * stride for size, stride in steps) + 1 if elements else 0
        if end * item_size > storage.size:
            raise _Odd(
                f"a tensor {list(sizes)} that reaches beyond its storage of {storage.size} bytes"
            )
        return self._tensor(elements, item_size)

    def _tensor(self, elements: int, item_size: int) -> _Tensor:
        self.asked.tensors += 1
        self.asked.size += elements * item_size
        return _Tensor(elements)


def _full_name(argument: str) -> str:
    module, _, name = argument.partition(" ")
    old = module == "__builtin__"
    return f"builtins.{_OLD_NAMES.get(name, name)}" if old else f"{module}.{name}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 62


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _check_keys(keys: Iterable[Any]) -> None:
    """Keys are hashed, which takes as long as they are, with what they share counted anew.

    Raises:
        _Odd: one is neither plain nor a short tuple, or a number that collides with others.
    """
    for key in keys:
        waiting, parts = [key], 1
        while waiting:
            part = waiting.pop()
            parts += len(part) // 64 if isinstance(part, str) else len(_items(part))
            if parts > _KEY or (isinstance(part, int) and abs(part) >= 1 << 61):
                raise _Odd("a table with a key that is no name")
            waiting.extend(_items(part))
