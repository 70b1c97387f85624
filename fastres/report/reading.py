"""Reads documents of results: told apart by their fields, and refused with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from fastres.calib.files import MOST_BYTES, read_regular
from fastres.errors import InputError
from fastres.report.documents import Accuracy, Bench, Document, GuardTrials, Parities, Scaling
from fastres.report.records import Profile
from fastres.text import json_text

SCHEMA = 1


@dataclass(frozen=True)
class Source:
    """A document, and what to call it."""

    name: str
    document: Document


def read(path: Path) -> Source:
    """Reads a file of results.

    Raises:
        InputError: it cannot be read, or it is not a document of a kind that is known here.
    """
    try:
        data = read_regular(path, MOST_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return decode(data, str(path))


def from_memory(document: Mapping[str, Any], name: str) -> Source:
    """The same of a document that was never written.

    Raises:
        InputError: it is not of a kind that is known here.
    """
    return decode(json_text(document).encode(), name)


def decode(data: bytes, name: str) -> Source:
    """Reads JSON.

    Raises:
        InputError: see `read`.
    """
    try:
        fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        schema = msgspec.json.decode(fields.get("schema", b"1"), type=int)
        if schema > SCHEMA:
            raise InputError(
                f"{name} was written by a newer fastres: its schema is {schema}, and this one "
                f"reads up to {SCHEMA}; upgrade fastres"
            )
        return Source(name, _decode(data, fields, name))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"{name} is not a document of results that fastres wrote: {error}; give what "
            "fastres bench -o FILE wrote, whole and unchanged"
        ) from error


def _decode(data: bytes, fields: Mapping[str, msgspec.Raw], name: str) -> Document:
    if "measurements" in fields:
        return msgspec.json.decode(data, type=Bench)
    if "series" in fields:
        return msgspec.json.decode(data, type=Scaling)
    if "sections" in fields:
        return msgspec.json.decode(data, type=Accuracy)
    if "trials" in fields:
        return msgspec.json.decode(data, type=GuardTrials)
    if "rows" in fields and "total" in fields:  # fastres profile --json
        return Bench((), profiles=(msgspec.json.decode(data, type=Profile),))
    if "rows" in fields:
        return msgspec.json.decode(data, type=Parities)
    found = ", ".join(list(fields)[:8]) or "none"
    raise InputError(
        f"{name} holds nothing to report on: its fields are {found}; supported are the documents "
        "of fastres bench, fastres profile, bench.cpu.scaling, bench.accuracy, bench.cpu.int8 and "
        "bench.cpu.guard_trials"
    )
