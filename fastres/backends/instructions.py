"""Which instructions this processor has for products of 8-bit integers."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

_BY_FLAG = (  # as Linux names them, the fastest first
    ("amx_int8", "AMX"),
    ("avx512_vnni", "AVX-512 VNNI"),
    ("avx_vnni", "AVX VNNI"),
)


@cache
def int8_instructions() -> str:
    """AMX, AVX-512 VNNI or AVX VNNI; "no VNNI" for an x86 without, or one that cannot be asked."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return platform.machine()
    flags = _flags()
    return next((name for flag, name in _BY_FLAG if flag in flags), "no VNNI")


def sums_in_32_bits() -> bool:
    """Whether products are summed in 32 bits from the start.

    An x86 without VNNI multiplies bytes in pairs and sums each pair in 16 bits, which overflow
    beyond 2^15 (VPMADDUBSW). Source: Intel Intrinsics Guide.
    """
    return int8_instructions() != "no VNNI"


def _flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line.partition(":")[2] for line in text.splitlines() if line.startswith("flags"))
    return frozenset(next(lines, "").split())
