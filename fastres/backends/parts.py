"""Compiled parts of a saved engine that are JSON: how large they may be, and how they are read."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from fastres.errors import ArtifactError

MOST_BYTES = 16 << 20  # of each; in memory it is up to 20 times that
_T = TypeVar("_T")


def read_part(name: str, data: bytes, kind: type[_T]) -> _T:
    """What a compiled part says.

    Raises:
        ArtifactError: it is too large, no JSON, or not of this kind.
    """
    if len(data) > MOST_BYTES:
        raise ArtifactError(
            f"{name} cannot be read: it has {len(data)} bytes, such a part has at most "
            f"{MOST_BYTES}. Compile the model anew"
        )
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactError(f"{name} cannot be read: {error}") from error
