"""Machine code that travels with a saved engine: what was compiled on one machine, run on another.

    compiled_triton_kernels.json    headers of the kernels, and linked plans
    compiled_triton_kernels.bin     their machine code, back to back

Machine code can do anything that this process can, so it is used only where the caller trusts the
file. Imports no triton.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from fastres.backends.base import CompiledParts
from fastres.backends.triton.link import LinkedPlan
from fastres.backends.triton.plan import Plan
from fastres.backends.triton.stored import recorded
from fastres.backends.triton.table import kernels_digest
from fastres.errors import ArtifactError
from fastres.kernels.binary import KernelBinary, KernelHeader

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


def write_code(
    target: str, kernels: Mapping[str, KernelBinary], plans: Sequence[LinkedPlan]
) -> dict[str, bytes]:
    """Both files, by name."""
    pieces, code = [], bytearray()
    for key, binary in kernels.items():
        pieces.append(Piece(key, len(code), len(binary.cubin), binary.header))
        code += binary.cubin
    stored = StoredCode(target, kernels_digest(), tuple(pieces), tuple(plans))
    text = msgspec.json.format(msgspec.json.encode(stored), indent=1)
    return {KERNELS: text, CODE: bytes(code)}


def read_code(files: Mapping[str, bytes]) -> MachineCode | None:
    """What the files hold; None if there are none.

    Raises:
        ArtifactError: they are damaged, or one is missing.
    """
    if KERNELS not in files and CODE not in files:
        return None
    if KERNELS not in files or CODE not in files:
        raise ArtifactError(f"{KERNELS} and {CODE} belong together; one is missing")
    try:
        stored = msgspec.json.decode(files[KERNELS], type=StoredCode)
        kernels = dict(_pieces(stored.kernels, files[CODE]))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ArtifactError(f"{KERNELS} cannot be read: {error}") from error
    if len(kernels) < len(stored.kernels):
        raise ArtifactError(f"{KERNELS} cannot be read: two kernels have one key")
    return MachineCode(stored.target, stored.sources, kernels, stored.plans)


def code_files(files: Mapping[str, bytes], plans: Sequence[Plan], target: str) -> dict[str, bytes]:
    """Both files as they are, to be saved again; {} where they do not go with these plans.

    Raises:
        ArtifactError: they are damaged.
    """
    code, before = read_code(files), recorded(files, target)
    kept = {plan.input_shapes: plan for plan in plans}
    if code is None or code.target != target:
        return {}
    shapes = [linked.input_shapes for linked in code.plans]
    if any(x not in kept or kept[x] != before.get(x) for x in shapes):
        return {}
    return {name: files[name] for name in (KERNELS, CODE)}


def brings_code(parts: CompiledParts) -> bool:
    """Whether there is machine code that the caller trusts."""
    return parts.trusted and KERNELS in parts.files


def usable_code(parts: CompiledParts, target: str) -> tuple[MachineCode | None, str | None]:
    """The machine code that may run on this architecture; or why what is there may not.

    Raises:
        ArtifactError: the files are damaged.
    """
    code = read_code(parts.files)
    if code is None or code.target != target:
        return None, None
    if not parts.trusted:
        return None, (
            f"the engine brings machine code for {target}, which was left alone: it can do "
            "anything that this process can. Kernels were compiled here instead; where you trust "
            "the file, fastres.load(path, trust_engine=True) runs it as it is"
        )
    if code.sources != kernels_digest():
        return None, (
            f"the engine brings machine code for {target} of another version of the kernels; they "
            "were compiled here instead. Save the engine anew to keep that"
        )
    return code, None


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
