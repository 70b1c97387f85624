"""Compiles without a GPU what the short runs of bench.gpu launch, into one file for its `--cache`.

python -m bench.gpu.cache [-o FILE] [--sm 90] [--seconds S] [--limit BYTES] [--work DIR]
                          (or: make gpu-cache)

In order of promise: what `--plan first` launches, the kernels of the tests marked gpu, what
`--plan second` launches. What there is no room or no time for is said, and compiled on the GPU's
machine. A second call with the same DIR goes on where the first ended. The python that runs it must
have the Triton of that machine; which Python that is does not matter.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench.gpu.cache.archive import LIMIT
from bench.gpu.cache.making import TESTS, make, of_jobs, of_tests
from bench.gpu.launches import jobs
from bench.gpu.plans import FIRST, SECOND
from fastres.kernels.cost import Target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.cache", description=__doc__.splitlines()[0]
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("build/gpu-cache.tar.xz"))
    parser.add_argument("--sm", type=int, default=90)
    parser.add_argument("--seconds", type=float, default=7200, help="in all, at most")
    parser.add_argument("--limit", type=int, default=LIMIT, help="bytes of the file, at most")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("build/gpu-cache"))
    given = parser.parse_args(arguments)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(given.work.resolve())
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    until, target = time.time() + given.seconds, Target.typical(given.sm)
    first, tests = jobs(FIRST, target), partial(of_tests, sm=given.sm, workers=given.workers)
    second = [job for job in jobs(SECOND, target) if job not in set(first)]
    parts = [
        ("the first run", partial(of_jobs, first, given.workers, until)),
        *((f"tests, {which}", partial(tests, which, until=until)) for which in TESTS),
        ("the second run", partial(of_jobs, second, given.workers, until)),
    ]
    print(json.dumps(make(parts, given.output, given.sm, given.limit), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
