"""What the short runs launch, compiled in order of promise until there is no time or no room."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import triton

from bench.children import ROOT, environment
from bench.gpu.cache.archive import LIMIT, Archive, Kernel, kernel_of, key_here
from bench.gpu.launches import Job, built_for, launches

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
        flags = ["-q", "-p", "bench.gpu.cache.plugin", "-p", "no:cacheprovider", "--tb=no"]
        flags += ["-n", str(workers)] if find_spec("xdist") else []
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *flags, *_FOLDERS],
            cwd=ROOT,
            env=environment() | told,
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
