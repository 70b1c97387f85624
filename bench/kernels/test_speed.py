"""Every kernel family on ResNet's layers, on a GPU:

python -m pytest bench/kernels/test_speed.py --benchmark-enable [-k FAMILY] [--tiles-in DIR]

A kernel is checked against PyTorch before it is timed, and after. Passes are replayed from a CUDA
graph and walk through operands that are larger than L2 together; the times are the GPU's own. What
is known of each stands in `extra_info`. Without a GPU all are skipped; bench.kernels.predictions
prints what the cost model expects of one.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.kernels.cases import KernelCase, cases, name_of
from bench.kernels.rates import rates
from bench.kernels.rotation import in_turn, one_pass, operand_bytes, rotation
from fastres.backends.triton.planning.table import Tiles
from fastres.backends.triton.running.answering import check_answers
from fastres.backends.triton.running.timing import REPEATS, stopwatch
from fastres.backends.triton.tuning.choosing import tiles_for
from fastres.errors import DeviceLost
from fastres.options import Options
from fastres.timing.machine import machine

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="kernel benchmarks need an NVIDIA GPU; bench.kernels.predictions calculates instead",
)
ROUNDS = 7
SETS = 1024  # of operands at most: a layer of one picture takes that many to fill L2


class GpuClock:
    """Seconds that the GPU has spent on timed passes: what pytest-benchmark reads as its timer."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def read(self) -> float:
        return self.seconds


CLOCK = GpuClock()  # the marker below wants it before any test runs


@pytest.fixture(scope="module")
def tiles(request: pytest.FixtureRequest) -> Tiles:
    return tiles_for(Options(cache_dir=request.config.getoption("--tiles-in", None)), device())


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    """GPU, driver, versions."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    found = machine()
    return {"gpu": found.gpu, "driver": driver.split()[0], "cuda": torch.version.cuda} | (
        found.versions
    )


def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def still_answers(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    end_if_lost(request.node.name)


def end_if_lost(test: str) -> None:
    """Ends the run where a test was the GPU's last: those behind it could only fail."""
    try:
        check_answers(device(), test)
    except DeviceLost as error:
        pytest.exit(str(error), returncode=1)


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize("case", cases(), ids=name_of)
def test_kernel(
    benchmark: BenchmarkFixture, case: KernelCase, tiles: Tiles, here: dict[str, Any]
) -> None:
    reason = case.refusal(tiles.target)
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    pose = partial(case.pose, tiles)
    first = pose(device())
    one_pass(first)
    assert first.wrong() is None
    sets = rotation(first, pose, device(), SETS)
    passes = len(sets) * -(-REPEATS // len(sets))  # whole turns
    timed = stopwatch(in_turn(sets), device(), passes)
    milliseconds = []

    def replay() -> None:
        milliseconds.append(timed())
        CLOCK.seconds += milliseconds[-1] / 1e3

    benchmark.group = case.family
    benchmark.pedantic(replay, rounds=ROUNDS)
    assert first.wrong() is None
    found = rates(first.calls, sorted(milliseconds)[len(milliseconds) // 2] / 1e3, tiles.target)
    benchmark.extra_info.update(here)
    benchmark.extra_info.update(
        family=case.family,
        layer=case.layer,
        batch_size=case.batch,
        dtype=case.precision,
        layout=case.layout,
        shape=case.shape,
        tile=first.tiles,
        passes=passes,
        rotated_bytes=len(sets) * operand_bytes(first),
        **found.to_dict(),
    )
