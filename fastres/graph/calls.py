"""One ATen call of an exported program, and what a reader may make of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.fx

from fastres.errors import CaptureError
from fastres.graph.ir import Op
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
        self.tags = target.tags
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
        """Whether the result may share memory with an argument."""
        return any(r.alias_info is not None for r in self.schema.returns)

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers: such a call, and no argument that switches it off."""
        if torch.Tag.nondeterministic_seeded not in self.tags:
            return False
        switches = ("p", "dropout_p", "train", "training")
        return all(self.args[name] for name in switches if name in self.args)

    @property
    def converts_in_place(self) -> bool:
        """Whether an in-place call rounds its result to the target's dtype."""
        if self.mutates is None:
            return False
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


def _is_tensor(arg: Any) -> bool:
    return isinstance(arg, torch.fx.Node) and isinstance(arg.meta.get("val"), torch.Tensor)
