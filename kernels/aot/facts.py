"""What a compiled kernel uses, as its machine code says: read without running it."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

from triton import knobs
from triton.compiler import CompiledKernel

from fastres.kernels.cost import Target
from fastres.kernels.launch import Launch

_REGISTERS = re.compile(r"\bREG:(\d+)")
MATRIX = re.compile(r"U?T?C?[HIQ]G?MMA\b")
_GLOBAL = re.compile(r"(?:LDG|STG|LDGSTS|UTMALDG|UTMASTG|UBLKCP|ATOMG?|REDG?|LD|ST)(?:\.|$)")
_NARROW = re.compile(r"LDG\..*U(?:8|16)\b")
_STORE = re.compile(r"(?:STS|STG|ST)(?:\.|$)")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "64": 8, "128": 16}  # of a store; without any of these 4
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", re.M)


@dataclass(frozen=True)
class KernelFacts:
    """What one compiled kernel uses.

    Args:
        registers: per thread.
        spill_stores: bytes a thread writes to local memory for want of registers.
        spill_loads: bytes it reads back.
        shared_bytes: shared memory a block asks for, static and dynamic.
        num_warps: warps in a block.
        instructions: how often each machine instruction stands in the code, by its full name.
        unguarded: accesses to global memory that stand before the wait for the kernel in front
            (`fastres.kernels.jit.dependent`): all of them in a kernel that does not wait.
        narrow: loads of 1 or 2 bytes from global memory before the last matrix instruction.
        ahead: requests to L2 for weights that stand before that wait.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    shared_bytes: int
    num_warps: int
    instructions: Mapping[str, int]
    unguarded: int = 0
    narrow: int = 0
    ahead: int = 0

    def count(self, *parts: str) -> int:
        """Instructions whose dotted name holds all the parts: count("LDG", "128")."""
        wanted = set(parts)
        return sum(n for name, n in self.instructions.items() if wanted <= set(name.split(".")))


def stores(facts: KernelFacts) -> dict[int, int]:
    """Stores to shared and global memory by how many bytes a thread moves with each.

    The copy engine's are left out, local memory's are spills. STSM stores 1, 2 or 4 registers.
    """
    found: Counter[int] = Counter()
    for name, count in facts.instructions.items():
        parts = name.split(".")
        if parts[0] == "STSM":
            found[4 * int(parts[-1]) if parts[-1].isdigit() else 4] += count
        elif _STORE.match(name):
            found[next((_BYTES[part] for part in parts if part in _BYTES), 4)] += count
    return dict(sorted(found.items()))


def facts_of(kernel: CompiledKernel) -> KernelFacts:
    """Reads what a compiled kernel uses.

    Raises:
        RuntimeError: a tool of Triton's wheel failed.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name)
        code = _tool(knobs.nvidia.nvdisasm.path, "-c", cubin.name)
    names = _INSTRUCTION.findall(code)
    instructions = Counter(names)
    before = list(takewhile(lambda name: not name.startswith("ACQBULK"), names))
    last = max((i for i, name in enumerate(names) if MATRIX.match(name)), default=0)
    return KernelFacts(
        registers=int(_REGISTERS.findall(usage)[0]),
        spill_stores=_local_bytes(instructions, "STL"),
        spill_loads=_local_bytes(instructions, "LDL"),
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        instructions=dict(instructions),
        unguarded=sum(_GLOBAL.match(name) is not None for name in before),
        narrow=sum(_NARROW.match(name) is not None for name in names[:last]),
        ahead=sum(name.startswith("UBLKPF") for name in before),
    )


def narrow_loads(launch: Launch, facts: KernelFacts) -> int:
    """Loads of 1 or 2 bytes, but for those of the path for NaN (`jit.taps`) behind a product.

    A kernel that has such a path is not asked about what is read for its epilogue.
    """
    constants = launch.constants
    if constants.get("FOLDED") or constants.get("MERGED", 1) != 1 or "TAPS" in constants:
        return facts.narrow
    return facts.count("LDG", "U8") + facts.count("LDG", "U16")


def fits(facts: KernelFacts, sm: int) -> bool:
    """Whether a block's shared memory is within the target's limit, which no compiler checks."""
    return facts.shared_bytes <= Target.typical(sm).shared_bytes


def _tool(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr


def _local_bytes(instructions: Mapping[str, int], kind: str) -> int:
    """Bytes that instructions such as STL.64 move; without a width they move 4."""
    return sum(
        count * max([4, *(int(part) // 8 for part in name.split(".")[1:] if part.isdigit())])
        for name, count in instructions.items()
        if name.split(".")[0] == kind
    )
