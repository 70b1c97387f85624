"""What Python objects hold: their parts, their attributes, the globals that their code reads."""

from __future__ import annotations

import dis
import gc
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

SHARED = {  # kinds that hold nothing: a copy has the same
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    type,
    types.ModuleType,
    types.CodeType,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
}


def reachable(roots: Iterable[object], without: Iterable[int] = ()) -> Iterator[object]:
    """Every object that these hold or refer to weakly, themselves included.

    What code names by itself (modules, classes, globals) is not held by it.

    Args:
        without: ids of objects to leave out, with what only they hold.
    """
    waiting, seen = list(roots), set(without)
    while waiting:
        value = waiting.pop()
        if type(value) in SHARED or isinstance(value, type) or id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        waiting += _parts(value)


def _parts(value: object) -> list[Any]:
    if isinstance(value, Tensor):
        return []
    if type(value) is weakref.ref:
        return [value()]
    if isinstance(value, types.FunctionType):  # not its globals
        held = [value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__]
        return [part for part in held if part]
    return gc.get_referents(value)


def loaded_globals(function: types.FunctionType) -> dict[str, Any]:
    """The globals that a function's code reads, by name, as far as there are such."""
    names = {i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"}
    known = function.__globals__
    return {name: known[name] for name in names if name in known}


def attributes_of(value: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attributes and slots, whatever the object says of itself."""
    state = object.__getstate__(value)
    own, slots = state if isinstance(state, tuple) else (state, None)
    return own or {}, slots or {}
