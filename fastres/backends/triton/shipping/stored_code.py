"""When the machine code that a saved engine brings may be used; `stored_kernels.py` reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from fastres.backends.base import CompiledParts
from fastres.backends.triton.planning.plan import Plan
from fastres.backends.triton.planning.table import kernels_digest
from fastres.backends.triton.running.linked import LinkedPlan
from fastres.backends.triton.shipping.stored import recorded
from fastres.backends.triton.shipping.stored_kernels import (
    CODE,
    KERNELS,
    MachineCode,
    Piece,
    StoredCode,
    read_code,
)
from fastres.kernels.compiled.binary import KernelBinary


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
    if KERNELS in parts.files and not parts.trusted:  # nor is it read
        return None, (
            "the engine brings machine code, which was left alone: it can do anything that this "
            "process can. Kernels were compiled here instead; where you trust the file, "
            "fastres.load(path, trust_engine=True) runs it as it is, if it is for this GPU"
        )
    code = read_code(parts.files)
    if code is None or code.target != target:
        return None, None
    if code.sources != kernels_digest():
        return None, (
            f"the engine brings machine code for {target} of another version of the kernels; they "
            "were compiled here instead. Save the engine anew to keep that"
        )
    return code, None
