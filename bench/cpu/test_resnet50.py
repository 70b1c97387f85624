"""ResNet-50 on the CPU, ours and its peers: `python -m pytest bench --benchmark-enable`.

One after the other, so these figures are for following one target over time. Targets are held
against each other by `fastres bench`, which interleaves them.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import fastres
from fastres.errors import BackendUnavailable, UnsupportedError
from fastres.options import Precision
from fastres.timing.benchmark import Target
from fastres.timing.checks import Reference, check_target
from fastres.timing.machine import machine
from fastres.timing.peers import PEERS, make_peer
from fastres.timing.peers_torch import torch_threads

THREADS = len(os.sched_getaffinity(0))


def prepare(name: str, model: nn.Module, x: Tensor, precision: Precision) -> Target:
    """Ours or a peer; skips what cannot run here, with the reason."""
    try:
        if name != "fastres":
            return make_peer(name, model, x, precision=precision, threads=THREADS)
        engine = fastres.compile(model, x, backend="cpu", precision=precision, threads=THREADS)
        return Target(name, engine, precision)
    except (BackendUnavailable, UnsupportedError) as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["fastres", *PEERS])
def test_resnet50(
    benchmark: BenchmarkFixture,
    name: str,
    precision: Precision,
    batch_size: int,
    network: Callable[[str], nn.Module],
    photographs: Callable[[int], Tensor],
    expected: Callable[[str, int, Precision], Reference],
) -> None:
    x = photographs(batch_size)
    target = prepare(name, network("resnet50"), x, precision)
    want = expected("resnet50", batch_size, precision)
    found = check_target(target, want, x, precision)
    with torch_threads(THREADS):
        benchmark.pedantic(target.call, (x,), rounds=20, warmup_rounds=3)
    here = machine()
    benchmark.extra_info.update(
        cpu=here.cpu, threads=THREADS, precision=precision, largest_error=found.largest
    )
    benchmark.extra_info.update(here.versions)
    if benchmark.stats is not None:  # None where timing is disabled
        benchmark.extra_info["images_per_second"] = batch_size / benchmark.stats.stats.median
