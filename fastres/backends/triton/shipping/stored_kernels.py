"""Machine code that travels with a saved engine: what was compiled on one machine, run on another.

    compiled_triton_kernels.json    headers of the kernels, and linked plans
    compiled_triton_kernels.bin     their machine code, back to back

Machine code can do anything that this process can, so it is used only where the caller trusts the
file. Imports neither triton nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from fastres.backends.parts import read_part
from fastres.backends.triton.running.linked import LinkedPlan
from fastres.errors import ArtifactError
from fastres.kernels.compiled.binary import KernelBinary, KernelHeader

KERNELS = "compiled_triton_kernels.json"
CODE = "compiled_triton_kernels.bin"


class Piece(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kernel: the digest of what it was specialised for, and where its machine code lies."""

    key: str
    offset: int
    size: int
    header: KernelHeader


class StoredCode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of compiled_triton_kernels.json.

    Args:
        target: architecture, as "sm_90".
        sources: digest of the kernels' sources that it was compiled from.
    """

    target: str
    sources: str
    kernels: tuple[Piece, ...]
    plans: tuple[LinkedPlan, ...]
    schema: Literal[1] = 1


@dataclass(frozen=True)
class MachineCode:
    """The same in memory.

    Args:
        kernels: in their stored order, by `link_build.digest_of` the launches that run them.
        plans: whose launches count the kernels.
    """

    target: str
    sources: str
    kernels: Mapping[str, KernelBinary]
    plans: tuple[LinkedPlan, ...]

    @property
    def headers(self) -> dict[str, KernelHeader]:
        return {key: binary.header for key, binary in self.kernels.items()}


def read_code(files: Mapping[str, bytes]) -> MachineCode | None:
    """What the files hold; None if there are none.

    Raises:
        ArtifactError: they are damaged, or one is missing.
    """
    if KERNELS not in files and CODE not in files:
        return None
    if KERNELS not in files or CODE not in files:
        raise ArtifactError(
            f"{KERNELS} and {CODE} belong together; one is missing. Copy the engine anew"
        )
    stored = read_part(KERNELS, files[KERNELS], StoredCode)
    try:
        kernels = dict(_pieces(stored.kernels, files[CODE]))
    except ValueError as error:
        raise ArtifactError(f"{KERNELS} cannot be read: {error}") from error
    if len(kernels) < len(stored.kernels):
        raise ArtifactError(f"{KERNELS} cannot be read: two kernels have one key")
    if len({plan.input_shapes for plan in stored.plans}) < len(stored.plans):
        raise ArtifactError(f"{KERNELS} cannot be read: two plans are for the same inputs")
    return MachineCode(stored.target, stored.sources, kernels, stored.plans)


def _pieces(pieces: Sequence[Piece], code: bytes) -> list[tuple[str, KernelBinary]]:
    """The kernels, whose machine code must fill the file without gaps.

    Raises:
        ValueError: it does not, or is not what a header says.
    """
    found, end = [], 0
    for piece in pieces:
        if piece.offset != end or piece.size < 0:
            raise ValueError(f"{piece.header.kernel} lies at {piece.offset}, expected {end}")
        end += piece.size
        found.append((piece.key, KernelBinary(piece.header, code[piece.offset : end])))
    if end != len(code):
        raise ValueError(f"{CODE} has {len(code)} bytes, expected {end}")
    return found
