"""Copies of models, also of those that `copy.deepcopy` refuses or gives back changed."""

from __future__ import annotations

import copy
import gc
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fastres.errors import InputError, described
from fastres.graph.objects import SHARED, attributes_of, loaded_globals, reachable

_Model = TypeVar("_Model", bound=nn.Module)


def copied(
    model: _Model,
    instead: Mapping[int, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> _Model:
    """A model that computes the same and shares nothing that running it could change.

    Modules are made anew with the attributes that they have, whatever `__deepcopy__` they bring, so
    training flags, names and aliases stay. Computed tensors become constants. Shared is what cannot
    be copied and holds no tensor: locks, open files, streams. What refers to a part of the model
    (methods, closures, weak references) refers to the same part of the copy.

    Args:
        model: any; nothing in it changes.
        instead: tensors that take the place of the model's in the copy, by the `id` of those.
        dtype: of all floating-point tensors of the copy, also of those that are plain attributes,
            which `Module.to` would leave; None keeps each one's own.
        device: of all tensors of the copy; None keeps each one's own.

    Raises:
        InputError: an attribute holds tensors and cannot be copied; it is named.
    """
    return cast(_Model, _Copier(model, instead or {}, dtype, device).copy())


def to_trace(model: _Model) -> _Model:
    """A copy that has the model's own parameters and buffers, and keeps what tracing leaves behind.

    It shares what cannot be copied.
    """
    own = (*model.parameters(), *model.buffers())
    instead = {id(t): t for t in own if not t.is_inference()}
    return cast(_Model, _Copier(model, instead, shares=True).copy())


class _Copier:
    """Copies a graph of objects, each object once.

    As `copy.deepcopy` does it, but for modules, tensors, closures, weak references, and what
    refuses to be copied.

    Args:
        shares: what holds tensors and cannot be copied, instead of refusing it.
    """

    def __init__(
        self,
        model: nn.Module,
        instead: Mapping[int, Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        shares: bool = False,
    ) -> None:
        self._model, self._shares = model, shares
        self._memo: dict[int, Any] = dict(instead)
        self._originals: list[object] = []  # an id is an object's own only while it lives
        self._dtype, self._device = dtype, device
        self._names = {id(module): name for name, module in model.named_modules()}
        self._own = self._names.keys() | {id(t) for t in (*model.parameters(), *model.buffers())}
        self._place: list[str] = []  # the attributes on the way to what is being copied
        self._ways: dict[type, Callable[[Any], Any]] = {
            dict: self._dict,
            OrderedDict: self._dict,
            list: self._list,
            tuple: lambda value: tuple(map(self.of, value)),
            types.MappingProxyType: lambda value: types.MappingProxyType(self.of(dict(value))),
            types.FunctionType: self._function,
            types.CellType: self._cell,
            types.MethodType: self._method,
            types.BuiltinFunctionType: self._builtin,
            weakref.ref: self._reference,
            weakref.ProxyType: self._proxy,
            weakref.CallableProxyType: self._proxy,
        }

    def copy(self) -> nn.Module:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a class is to go: PyTorch's own, in its trees
            return cast(nn.Module, self.of(self._model))

    def of(self, value: Any) -> Any:
        kind = type(value)
        if kind in SHARED:
            return value
        if id(value) in self._memo:
            return self._memo[id(value)]
        if kind not in self._ways:
            self._ways[kind] = self._way(kind)
        return self._ways[kind](value)

    def _way(self, kind: type) -> Callable[[Any], Any]:
        if issubclass(kind, torch.jit.ScriptModule):
            return self._script
        if issubclass(kind, nn.Module):
            return self._module
        if issubclass(kind, Tensor):
            return self._tensor
        if issubclass(kind, type | types.ModuleType):
            return lambda value: value
        return self._object

    def _keep(self, value: object, new: Any) -> Any:
        self._originals.append(value)
        self._memo[id(value)] = new
        return new

    def _module(self, module: nn.Module) -> nn.Module:
        kind = type(module)
        if isinstance(module, GraphModule):  # each has a class of its own, for its `forward`
            new: Any = kind.__new__(kind)
            type(new).forward = kind.forward
        else:
            new = object.__new__(kind)
        self._keep(module, new)
        own, slots = attributes_of(module)
        for name, value in own.items():
            # what `Module.compile` made of the original's forward; the class has None
            if name != "_compiled_call_impl":
                new.__dict__[name] = self._attribute(module, name, value)
        for name, value in slots.items():
            object.__setattr__(new, name, self._attribute(module, name, value))
        return cast(nn.Module, new)

    def _attribute(self, module: nn.Module, name: str, value: Any) -> Any:
        self._place.append(f"{self._names.get(id(module)) or type(module).__name__}.{name}")
        new = self.of(value)
        self._place.pop()
        return new

    def _tensor(self, tensor: Tensor) -> Any:
        try:
            plain = tensor.detach()  # what was computed cannot be deep-copied, this can
            if self._dtype is not None or self._device is not None:
                new = self._moved(plain, copy=True)
            elif type(plain) is Tensor and not plain.is_nested:
                new = copy.deepcopy(plain, self._memo)  # tensors that share memory do so again
            else:
                new = plain.clone()
        except Exception as error:  # a subclass's own code, which may raise anything
            return self._refuse(tensor, error)
        if type(tensor) is nn.Parameter:
            new = nn.Parameter(new, tensor.requires_grad)
        self._keep(tensor, new)
        if tensor.__dict__ and type(tensor) in (Tensor, nn.Parameter):
            new.__dict__.update(self.of(tensor.__dict__))
        return new

    def _moved(self, new: Any, **how: bool) -> Any:
        """A tensor, or module, in the dtype and on the device that were asked for."""
        is_cast = not isinstance(new, Tensor) or new.is_floating_point()
        return new.to(self._device, self._dtype if is_cast else None, **how)

    def _script(self, module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
        return cast(torch.jit.ScriptModule, self._keep(module, self._moved(copy.deepcopy(module))))

    def _dict(self, value: dict[Any, Any]) -> Any:
        new = self._keep(value, type(value)())
        for key, held in value.items():
            new[self.of(key)] = self.of(held)
        return new

    def _list(self, value: list[Any]) -> Any:
        new = self._keep(value, [])
        new += map(self.of, value)
        return new

    def _method(self, method: types.MethodType) -> types.MethodType:
        return types.MethodType(self.of(method.__func__), self.of(method.__self__))

    def _builtin(self, function: types.BuiltinFunctionType) -> Any:
        if isinstance(function.__self__, type | types.ModuleType | None):
            return function
        return getattr(self.of(function.__self__), function.__name__)

    def _reference(self, reference: weakref.ref[Any]) -> weakref.ref[Any]:
        referent = reference()
        return weakref.ref(self.of(referent)) if id(referent) in self._own else reference

    def _proxy(self, proxy: Any) -> Any:
        referent = proxy.__init__.__self__  # no proxy says directly whose it is
        return weakref.proxy(self.of(referent)) if id(referent) in self._own else proxy

    def _function(self, function: types.FunctionType) -> Any:
        read = loaded_globals(function)
        used = {name: self.of(value) for name, value in read.items() if self._is_own(value)}
        held = (part for part in reachable([function]) if isinstance(part, Tensor | nn.Module))
        if not used and next(held, None) is None:
            return self._keep(function, function)  # PyTorch knows some by identity
        new = types.FunctionType(
            function.__code__,
            function.__globals__ | used if used else function.__globals__,
            function.__name__,
            closure=tuple(map(self.of, function.__closure__ or ())),
        )
        self._keep(function, new)
        new.__defaults__ = self.of(function.__defaults__)
        new.__kwdefaults__ = self.of(function.__kwdefaults__)
        new.__qualname__, new.__module__ = function.__qualname__, function.__module__
        new.__dict__.update(self.of(function.__dict__))
        return new

    def _is_own(self, value: object) -> bool:
        """Whether it is a part of the model, or a method of one."""
        return id(getattr(value, "__self__", value)) in self._own

    def _cell(self, cell: types.CellType) -> Any:
        new = self._keep(cell, types.CellType())
        for held in gc.get_referents(cell):  # none, where nothing was put into it
            new.cell_contents = self.of(held)
        return new

    def _object(self, value: Any) -> Any:
        by_itself = hasattr(type(value), "__deepcopy__")
        try:
            found = self._deepcopied(value) if by_itself else value.__reduce_ex__(4)
        except Exception as error:  # an object's own code, which may raise anything
            return self._without_copy(value, error)
        if found is value:
            return self._without_copy(value, TypeError("its __deepcopy__ returns itself"))
        if by_itself:
            return self._keep(value, found)
        # a string is the name of a global
        return value if isinstance(found, str) else self._rebuilt(value, *found)

    def _deepcopied(self, value: Any) -> Any:
        """By the object's own method; where that fails half-way, nothing is remembered of it."""
        memo = dict(self._memo)
        new = copy.deepcopy(value, memo)
        self._memo.update(memo)
        self._originals.append(memo)  # has its own id in it, as deepcopy does it
        return new

    def _without_copy(self, value: Any, error: Exception) -> Any:
        """An object that gives no copy is shared, unless it holds what a copy needs for itself.

        Then it is made anew from its attributes.
        """
        if not any(isinstance(held, Tensor | nn.Module) for held in reachable([value])):
            return self._keep(value, value)
        try:
            object.__new__(type(value))
        except TypeError:  # it keeps what it holds in C
            return self._refuse(value, error)
        return self._rebuilt(value, object.__new__, (type(value),), attributes_of(value))

    def _refuse(self, value: object, error: Exception) -> Any:
        if self._shares:
            return self._keep(value, value)
        why, *_ = described(error).splitlines()
        raise InputError(
            f"{self._place[-1]} is {type(value).__name__}, which holds tensors and cannot be "
            f"copied ({why}); a copy is run, so that nothing in the model changes. "
            "Set the attribute to None first, or keep the tensors in a list or a dict"
        ) from error

    def _rebuilt(
        self,
        value: Any,
        make: Any,
        args: tuple[Any, ...],
        state: Any = None,
        items: Iterator[Any] | None = None,
        pairs: Iterator[tuple[Any, Any]] | None = None,
        set_state: Any = None,
    ) -> Any:
        """What `__reduce_ex__` says, of copies."""
        new = self._keep(value, self.of(make)(*map(self.of, args)))
        if state is not None:
            state = self._keep(state, self.of(state))
            if set_state is not None:
                set_state(new, state)
            elif hasattr(type(new), "__setstate__") and make is not object.__new__:
                new.__setstate__(state)
            else:
                own, slots = state if isinstance(state, tuple) else (state, {})
                if own:
                    new.__dict__.update(own)
                for name, held in slots.items():
                    object.__setattr__(new, name, held)
        for item in items or ():
            new.append(self.of(item))
        for key, held in pairs or ():
            new[self.of(key)] = self.of(held)
        return new
