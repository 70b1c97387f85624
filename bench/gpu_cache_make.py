"""Compiles without a GPU what the short runs of gpu.py launch, into one file for its `--cache`.

python bench/gpu_cache_make.py [-o FILE] [--sm 90] [--seconds S] [--limit BYTES] [--work DIR]
                               (or: make gpu-cache)

In order of promise: what `--plan first` launches, the kernels of the tests marked gpu, what
`--plan second` launches. What there is no room or no time for is said, and compiled on the GPU's
machine. A second call with the same DIR goes on where the first ended. The python that runs it must
have the Triton of that machine; which Python that is does not matter.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import checkout
import triton
from gpu_cache import LIMIT, Archive, Kernel, kernel_of, key_here
from gpu_launches import Job, built_for, jobs, launches
from gpu_plans import FIRST, SECOND

from fastres.kernels.cost import Target

ROOT = Path(checkout.__file__).parents[1]
TESTS = ("first", "all")  # of those marked gpu: one of each kernel family, then all
_FOLDERS = ("tests/kernels", "tests/backends/triton")


def compiled(job: Job) -> list[Kernel]:
    """The kernels of a job; those that do not compile are left to the GPU's machine to name."""
    found: list[Kernel] = []
    with suppress(Exception):  # of Triton or its compiler: they raise many kinds
        for launch in launches(job):
            with suppress(Exception):
                found.append(kernel_of(launch, built_for(job).sm))
    return found


def of_jobs(asked: Sequence[Job], workers: int, until: float) -> Iterator[Kernel]:
    """The kernels of jobs, in their order.

    Raises:
        TimeoutError: there was no time for the rest.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending = [pool.submit(compiled, job) for job in asked]
        try:
            for future in pending:
                yield from future.result(max(0.0, until - time.time()))
        finally:  # also where the caller has had enough
            pool.shutdown(cancel_futures=True)


def of_tests(which: str, sm: int, workers: int, until: float) -> Iterator[Kernel]:
    """What tests marked gpu launch: they run on the CPU, and no kernel is started.

    Raises:
        TimeoutError: there was no time for the rest.
    """
    if find_spec("pytest") is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        told = {"KERNELS_OF": which, "KERNELS_SM": str(sm), "KERNELS_TO": folder}
        path = os.pathsep.join([str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])
        flags = ["-q", "-p", "gpu_cache_tests", "-p", "no:cacheprovider", "--tb=no"]
        flags += ["-n", str(workers)] if find_spec("xdist") else []
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *flags, *_FOLDERS],
            cwd=ROOT,
            env={**os.environ, **told, "PYTHONPATH": path.rstrip(os.pathsep)},
            stdout=subprocess.DEVNULL,
        )
        late = False
        try:
            process.wait(max(1.0, until - time.time()))
        except subprocess.TimeoutExpired:
            late = True
            process.terminate()
            process.wait()
        for file in sorted(Path(folder).glob("*.pickle")):
            with suppress(EOFError, pickle.UnpicklingError):  # it was ended while it wrote
                yield pickle.loads(file.read_bytes())
        if late:
            raise TimeoutError


def make(
    parts: Sequence[tuple[str, Callable[[], Iterator[Kernel]]]],
    path: Path,
    sm: int,
    limit: int = LIMIT,
) -> dict[str, object]:
    """Fills an archive.

    Args:
        parts: names and kernels, in order of promise. Once the archive is full, of the part that
            did not fit only what is compiled already is counted, and no more is compiled.

    Returns:
        How many kernels it holds of each part, and of which not all for want of time or room.
    """
    started, archive, held = time.time(), Archive(path, key_here(sm), limit), {}
    left_out: dict[str, str] = {}
    for name, kernels in parts:
        before = archive.kernels
        try:
            for kernel in () if archive.full else kernels():
                archive.add(kernel)
                if archive.full:
                    break
        except TimeoutError:
            left_out[name] = "time"
        archive.flush()
        held[name] = archive.kernels - before
        left_out |= {name: "room"} if archive.full else {}
        print(f"{name}: {held[name]} kernels, {archive.bytes / 2**20:.1f} MiB", flush=True)
    archive.close()
    return {
        "triton": triton.__version__,
        "file": str(path),
        "bytes": path.stat().st_size,
        "kernels": archive.kernels,
        "of": held,
        "not_all_for_want_of": left_out,
        "launchers": archive.launchers,
        "seconds": round(time.time() - started, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
