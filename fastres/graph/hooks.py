"""Forward hooks: those that are part of a network, and those that somebody looks at it with.

An engine calls none, and `torch.export` calls all of them, once, on tensors without values.
"""

from __future__ import annotations

import dis
import functools
import gc
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fastres.errors import CaptureError
from fastres.graph.objects import SHARED, loaded_globals, reachable

_Hook = Callable[..., Any]


def check_hooks(model: nn.Module) -> None:
    """Refuses a model with a forward hook, or pre-hook, that is no part of the network.

    Parts of it are: hooks of PyTorch's own, such as `torch.nn.utils.weight_norm`, and of the
    installed packages that the model's classes come from; hooks that keep things in nothing but
    what the model itself holds; functions that keep nothing and return something.

    Raises:
        CaptureError: there is another; it names the module and the function.
    """
    hooks = list(_hooks(model))
    if not hooks:
        return
    packages = {"torch"} | {_installed(type(module)) for module in model.modules()}
    held = _held_by(model)
    for where, hook in hooks:
        if not _is_part(hook, packages - {None}, held):
            raise CaptureError(
                f"{where} has a forward hook, {_shown(hook)}: an engine calls no hooks, while "
                "compiling and verifying would, with tensors of their own. Call its handle.remove()"
                " first; for features, return them from forward, or compile torchvision's "
                "create_feature_extractor(model, [...]). If it is part of the network, move it into"
                " forward, or keep what it is bound to in an attribute of the model"
            )


@torch.no_grad()
def renew_weights(model: nn.Module) -> None:
    """Has the hooks of `torch.nn.utils` put the weights that they compute into the model.

    As any call of it would. What they leave when they are put on, or under gradients, has a history
    that keeps the model from being deep-copied (PyTorch's issue 28594); the new ones have none.
    """
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod | SpectralNorm | WeightNorm):
                hook(module, ())


def _hooks(model: nn.Module) -> Iterator[tuple[str, _Hook]]:
    for kind in ("_global_forward_pre_hooks", "_global_forward_hooks"):
        for hook in getattr(torch_module, kind).values():
            yield "torch.nn.modules.module (for every module)", hook
    for name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            yield f"the module {name or type(module).__name__!r}", hook


def _held_by(model: nn.Module) -> set[int]:
    """The ids of all that the model holds otherwise than by its hooks."""
    registries = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    left_out = [id(vars(module).get(name)) for module in model.modules() for name in registries]
    return {id(value) for value in reachable([model], without=left_out)}


def _is_part(hook: _Hook, packages: set[str | None], held: set[int]) -> bool:
    code = _code_of(hook)
    if isinstance(code, BasePruningMethod) or _installed(code) in packages:
        return True
    keeps = _keeps(hook, held)
    if not keeps:
        return isinstance(code, types.FunctionType) and _returns_something(code)
    return all(id(value) in held for value in keeps)


def _keeps(hook: _Hook, held: set[int]) -> list[object]:
    """What a hook could keep something in: all that it is bound to, save for constants and code."""
    found: list[object] = []
    waiting: list[Any] = [hook]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if type(value) in SHARED or isinstance(value, type) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, tuple | frozenset):
            waiting += value
        elif id(value) in held:
            found.append(value)
        elif isinstance(value, weakref.ref):
            waiting.append(value())
        elif isinstance(value, functools.partial):
            waiting += (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, types.MethodType):
            waiting.append(value.__self__)
        elif isinstance(value, types.BuiltinFunctionType):
            waiting.append(value.__self__)
        elif isinstance(value, types.FunctionType):
            names = loaded_globals(value).values()
            waiting += [named for named in names if not isinstance(named, types.FunctionType)]
            waiting += gc.get_referents(*(value.__closure__ or ()))
            waiting += (value.__defaults__, *(value.__kwdefaults__ or {}).values())
        else:
            found.append(value)
    return found


def _code_of(hook: Any) -> Any:
    """The function that is called in the end, or the object."""
    while isinstance(hook, functools.partial | types.MethodType):
        hook = hook.func if isinstance(hook, functools.partial) else hook.__func__
    return hook


def _returns_something(function: types.FunctionType) -> bool:
    steps = [(step.opname, step.argval) for step in dis.get_instructions(function)]
    return any(
        step[0] == "RETURN_VALUE" and before != ("LOAD_CONST", None)
        for before, step in pairwise(steps)
    )


def _installed(code: Any) -> str | None:
    """The package that a class, a function or an object comes from; None if it is not installed."""
    defined = code if hasattr(code, "__qualname__") else type(code)
    package = str(defined.__module__).partition(".")[0]
    file = getattr(sys.modules.get(package), "__file__", None)
    if package == "torch" or file is None:
        return package if file else None
    folder = Path(file).parent
    folder = folder.parent if Path(file).stem == "__init__" else folder
    return package if any(folder.glob("*.dist-info")) else None


def _shown(hook: _Hook) -> str:
    """The name of a hook's function, and where it is written."""
    code = _code_of(hook)
    if not hasattr(code, "__qualname__"):
        code = type(code).__call__
    name, code = str(code.__qualname__), inspect.unwrap(code)
    if not isinstance(code, types.FunctionType):
        return name
    return f"{name} ({code.__code__.co_filename}:{code.__code__.co_firstlineno})"
