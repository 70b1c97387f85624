"""What is not as it should be in the machine code of 8 bits: `byte_faults`."""

import torch

from fastres.kernels.aot.facts import MATRIX, KernelFacts, fits, narrow_loads, stores
from fastres.kernels.launch import Launch

_INSTRUCTIONS = {  # Triton 3.6 has no UTCIMMA
    torch.int8: {90: {"IGMMA"}, 100: {"UTCIMMA", "IMMA"}},
    torch.float8_e4m3fn: {89: {"QMMA"}, 90: {"QGMMA"}, 100: {"UTCQMMA"}, 120: {"QMMA"}},
}


def matrix_fault(launch: Launch, facts: KernelFacts, sm: int) -> str | None:
    """What is wrong with the matrix instructions of a launch of 8 bits; None if nothing is."""
    (first, *_) = launch.tensors()
    multiplies = {"BLOCK_K", "DEPTH", "TAPS"} & launch.constants.keys()
    wanted = _INSTRUCTIONS[first.dtype].get(sm, {"IMMA"}) if multiplies else set()
    found = {name.split(".")[0] for name in facts.instructions if MATRIX.match(name)}
    if found <= wanted and len(found) == bool(multiplies):
        return None
    return f"matrix instructions {sorted(found)}, expected one of {sorted(wanted)}"


def byte_stores(launch: Launch, facts: KernelFacts, sm: int) -> int:
    """Stores of single bytes by a product or the sum of its parts.

    Of none on sm_100, whose sums lie in another order (`fastres.kernels.pairs`), nor where
    channels do not come in sixteens.
    """
    of_product = {"BLOCK_K", "DEPTH", "TAPS", "PARTS"} & launch.constants.keys()
    if 100 <= sm < 120 or not of_product or _uneven(launch.constants.get("K")):
        return 0
    return stores(facts).get(1, 0)


def _uneven(channels: object) -> bool:
    """Whether there are channels, and not in sixteens."""
    return isinstance(channels, int) and channels % 16 > 0


def byte_faults(launch: Launch, facts: KernelFacts, sm: int) -> list[str]:
    """What is not as it should be in the machine code of a launch of 8 bits, spills apart."""
    found = [] if fits(facts, sm) else [f"{facts.shared_bytes} bytes of shared memory"]
    if (fault := matrix_fault(launch, facts, sm)) is not None:
        found.append(fault)
    if launch.constants.get("ACTIVATION") in (None, "relu") and (fused := facts.count("FFMA")):
        found.append(f"{fused} products and sums are rounded at once")
    x = next(launch.tensors())  # a picture's pixels have three bytes, also where it is quantised
    picture = x.dtype == torch.uint8 or _uneven(launch.constants.get("C"))
    if narrow := 0 if picture else narrow_loads(launch, facts):
        found.append(f"{narrow} loads of 1 or 2 bytes")
    if single := byte_stores(launch, facts, sm):
        found.append(f"{single} stores of a byte")
    return found
