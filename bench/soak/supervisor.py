"""Many cases in processes of their own: a case that ends its process is one that is not well."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence

from bench.children import environment

CHUNK = 500  # cases that one process does
UNWELL = "not well"


def supervised(program: str, flags: Sequence[str], count: int, seed: int) -> Counter[str]:
    """Runs `-m PROGRAM --seed S --chunk FROM TO` until all are done; prints what became of them.

    Args:
        program: prints a line for each case: its number, and an answer or the kind of a refusal, or
            "BAD" and what was not well.

    Returns:
        How many cases there are of each kind; those that were not well under `UNWELL`.
    """
    counts: Counter[str] = Counter()
    at, begun = 0, time.monotonic()
    while at < count:
        stop = min(count, at + CHUNK)
        words = ["-m", program, "--seed", str(seed), *flags, "--chunk", str(at), str(stop)]
        done = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            errors="replace",
            env=environment(),
        )
        for line in done.stdout.splitlines():
            number, _, kind = line.partition(" ")
            if not number.isdigit():  # something of a library's that prints
                continue
            at = int(number) + 1
            counts[UNWELL if kind.startswith("BAD") else kind] += 1
            if kind.startswith("BAD"):
                print(f"case {number} of seed {seed}: {kind}", flush=True)
        if at < stop:
            counts[UNWELL] += 1
            print(f"case {at} of seed {seed} ended the process: {done.stderr[-500:]}", flush=True)
            at += 1
    kinds = ", ".join(f"{kind} {n}" for kind, n in counts.most_common())
    print(f"{at} cases in {time.monotonic() - begun:.0f} s: {kinds}")
    return counts
