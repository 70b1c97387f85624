"""One ATen call of an exported program, and what a reader may make of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.utils._pytree as pytree

from fastres.errors import CaptureError
from fastres.graph import operators
from fastres.graph.ir import Op
from fastres.graph.names import place_of
from fastres.kernels.geometry import Pair


class Emit(NamedTuple):
    """An operation, the values it reads, and its parameters by slot."""

    op: Op
    inputs: tuple[str, ...]
    params: dict[str, str] = {}


class Alias(NamedTuple):
    """The call returns this very value, in the same memory or (`copies`) in its own."""

    node: torch.fx.Node
    copies: bool = False


class Call:
    """One ATen call with its arguments by name, defaults filled in from the operator's schema.

    Args:
        value_of: the name of what a node gives.
        is_fixed: whether a node is a constant, or computed of constants alone.
    """

    def __init__(
        self,
        node: torch.fx.Node,
        value_of: Callable[[torch.fx.Node], str],
        is_fixed: Callable[[torch.fx.Node], bool],
    ) -> None:
        self.node = node
        self.value_of = value_of
        self.is_fixed = is_fixed
        target: Any = node.target
        if not isinstance(target, torch._ops.OpOverload):
            raise CaptureError(
                f"{getattr(target, '__name__', target)} in {place_of(node)} is no operator of "
                "PyTorch but a function, as torch.vmap and torch.func leave them in a program. "
                "Write that part with operations on the whole batch"
            )
        self.schema = target._schema
        self.operator = target
        self.overload = str(target)
        self.args: dict[str, Any] = {a.name: a.default_value for a in self.schema.arguments}
        names = [a.name for a in self.schema.arguments]
        self.args.update(zip(names, node.args, strict=False))
        self.args.update(node.kwargs)

    @property
    def functional(self) -> str:
        """The name of the overload that gives a new tensor instead of changing its first one.

        Its own name, where there is none with the same arguments.
        """
        return _functional(self.overload) if self.schema.is_mutable else self.overload

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
        """Whether the result may share memory with an argument."""
        return any(r.alias_info is not None for r in self.schema.returns)

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers: such a call, and no argument that switches it off."""
        return operators.draws(self.operator, (), self.args)

    @property
    def changes_oddly(self) -> bool:
        """Whether it changes something else than the one tensor that it returns, or rounds that.

        So do calls with out=, on lists, and in place on a tensor of another dtype.
        """
        if not self.schema.is_mutable:
            return False
        target, one = self.mutates, isinstance(self.node.meta.get("val"), torch.Tensor)
        if not one or not isinstance(target, torch.fx.Node) or self.functional == self.overload:
            return True
        dtypes = {n.meta["val"].dtype for n in self.node.all_input_nodes if _is_tensor(n)}
        return len(dtypes) > 1

    def shape(self, name: str) -> torch.Size:
        return self.args[name].meta["val"].shape  # type: ignore[no-any-return]

    def value(self, name: str) -> str:
        return self.value_of(self.args[name])

    def is_tensor(self, name: str) -> bool:
        return _is_tensor(self.args[name])

    def rank(self, name: str) -> int:
        return len(self.shape(name))

    def pair(self, name: str) -> Pair:
        value = self.args[name]
        items = [value] if isinstance(value, int) else list(value)
        return (items[0], items[-1])

    def params(self, **slots: str) -> dict[str, str] | None:
        """Slot → constant; None if one of them depends on what the model is fed."""
        found = {}
        for slot, name in slots.items():
            node = self.args[name]
            if node is None:
                continue
            if not self.is_fixed(node):
                return None
            found[slot] = self.value_of(node)
        return found


@functools.cache
def _functional(overload: str) -> str:
    space, name, variant = overload.split(".")
    pure: Any = getattr(torch.ops.aten, name.removesuffix("_"), None)
    if space != "aten" or not name.endswith("_") or pure is None:
        return overload
    wanted = _arguments(getattr(getattr(torch.ops.aten, name), variant))
    same = [v for v in pure.overloads() if _arguments(getattr(pure, v)) == wanted]
    if not same:
        return overload
    return f"aten.{name.removesuffix('_')}.{variant if variant in same else same[0]}"


def _arguments(operator: Any) -> list[tuple[str, str]]:
    """But the first one's name: what `dropout_` calls self is `dropout`'s input."""
    first, *others = operator._schema.arguments
    return [("", str(first.type)), *((a.name, str(a.type)) for a in others)]


def has_sizes(node: torch.fx.Node) -> bool:
    """Whether a call is given sizes that are not known yet."""
    given = pytree.tree_leaves((node.args, dict(node.kwargs)))
    values = (arg.meta.get("val") if isinstance(arg, torch.fx.Node) else arg for arg in given)
    return any(isinstance(value, torch.SymInt | torch.SymFloat) for value in values)


def _is_tensor(arg: Any) -> bool:
    return isinstance(arg, torch.fx.Node) and isinstance(arg.meta.get("val"), torch.Tensor)
