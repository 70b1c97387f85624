"""Names of nodes: the module's path, as torchvision's layers are called."""

from __future__ import annotations

from collections.abc import Iterable

import torch.fx


class Namer:
    """Gives every node a name of its own: the one wanted, or that with a number behind it.

    Args:
        taken: names that no node may have, such as those of the constants.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._seen: dict[str, int] = dict.fromkeys(taken, 0)

    def name(self, wanted: str) -> str:
        count = self._seen.get(wanted)
        self._seen[wanted] = 0 if count is None else count + 1
        return wanted if count is None else self.name(f"{wanted}_{count + 1}")


def module_of(node: torch.fx.Node) -> tuple[str, str]:
    """Path and type name of the innermost module that made this call."""
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values()), ("", ""))
    return str(path), kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def wanted_name(node: torch.fx.Node, short_name: str) -> str:
    """The layer's path where the call is that layer, else the call's name below its module's."""
    path, kind = module_of(node)
    if kind.startswith("torch.nn.modules.") and not kind.endswith("container.Sequential"):
        return path or short_name
    return f"{path}.{short_name}" if path else short_name


def place_of(node: torch.fx.Node) -> str:
    """Where a call stands, for messages."""
    path, _ = module_of(node)
    return f"module {path!r}" if path else "the model itself"
