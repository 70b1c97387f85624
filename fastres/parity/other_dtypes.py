"""Running a model's own calls in another floating dtype than it was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_LITERAL = "aten.lift_fresh.default"  # what torch.tensor([...]) ends with


class InDtype(TorchDispatchMode):
    """Inside, every floating dtype that a model names or takes for granted is another one.

    Named as in x.float(), taken for granted as in torch.ones(3). An operator that has no such dtype
    runs in the model's own, and its result is cast.

    Args:
        dtype: the one instead.
        own: the model's.
    """

    def __init__(self, dtype: torch.dtype, own: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype, self._own = dtype, own

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = pytree.tree_map(self._chosen, (args, dict(kwargs or {})))
        try:
            result = func(*given[0], **given[1])
        except RuntimeError:
            if self._own == self._dtype or func._schema.is_mutable:
                raise
            narrow = pytree.tree_map(lambda a: self._cast(a, self._own), given)
            return pytree.tree_map(self._wide, func(*narrow[0], **narrow[1]))
        made = str(func) == _LITERAL or not any(map(_is_floating, pytree.tree_leaves(given)))
        return pytree.tree_map(self._wide, result) if made else result

    def _chosen(self, arg: Any) -> Any:
        is_floating = isinstance(arg, torch.dtype) and arg.is_floating_point
        return self._dtype if is_floating else arg

    def _cast(self, arg: Any, dtype: torch.dtype) -> Any:
        return arg.to(dtype) if _is_floating(arg) else arg

    def _wide(self, arg: Any) -> Any:
        return self._cast(arg, self._dtype)


def _is_floating(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor) and arg.is_floating_point()
