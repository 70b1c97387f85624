"""Saved engines: containers, manifests, and what lies in them; nothing is taken on trust.

The names of `contents.py` are imported when they are first used: `fastres.deploy` opens containers
without PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastres.artifact.contents import Contents as Contents
    from fastres.artifact.contents import read as read
    from fastres.artifact.contents import write as write

__all__ = ["Contents", "read", "write"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fastres.artifact' has no attribute {name!r}")
    from fastres.artifact import contents

    return getattr(contents, name)
