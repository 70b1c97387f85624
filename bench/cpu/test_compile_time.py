"""What is paid before the first image: compile, load and import time, and memory at its peak."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import fastres
from bench.children import environment

# Run in a process of its own. VmHWM is the peak of this program alone; getrusage's ru_maxrss would
# count the parent at the moment of the fork.
PEAK = """
import sys, torch, openvino, fastres.compiler
from fastres import models
model = getattr(models, sys.argv[1])(seed=0).eval()
x = torch.zeros(1, 3, 224, 224)
if sys.argv[2] == "exported":  # torch.export loads most of itself when it is first used
    torch.export.export(torch.nn.Conv2d(3, 3, 1).eval(), (x,))
if sys.argv[2] == "compiled":
    fastres.compile(model, x, backend="cpu", precision="fp32")(x)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""
IMPORT = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import fastres
print(middle - start, time.perf_counter() - middle)
"""


def in_new_process(script: str, *arguments: str) -> list[float]:
    """The numbers that a script prints."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    return [float(word) for word in done.stdout.split()]


@pytest.mark.parametrize("name", ["resnet50", "resnet152"])
def test_compile(
    benchmark: BenchmarkFixture,
    name: str,
    network: Callable[[str], nn.Module],
    photographs: Callable[[int], Tensor],
) -> None:
    model, x = network(name), photographs(1)
    benchmark.pedantic(
        lambda: fastres.compile(model, x, backend="cpu").close(), rounds=3, warmup_rounds=1
    )


@pytest.mark.parametrize("name", ["resnet50", "resnet152"])
def test_load(
    benchmark: BenchmarkFixture,
    name: str,
    network: Callable[[str], nn.Module],
    photographs: Callable[[int], Tensor],
    tmp_path: Path,
) -> None:
    with fastres.compile(network(name), photographs(1), backend="cpu") as engine:
        engine.save(tmp_path / name)
    benchmark.pedantic(lambda: fastres.load(tmp_path / name).close(), rounds=3, warmup_rounds=1)


def test_import(benchmark: BenchmarkFixture) -> None:
    """Timed is the whole process; `import fastres` alone, after torch, is in extra_info."""
    found: list[list[float]] = []
    benchmark.pedantic(
        lambda: found.append(in_new_process(IMPORT)),
        rounds=5,
        warmup_rounds=1,
    )
    torch_s, fastres_s = (min(column) for column in zip(*found, strict=True))
    benchmark.extra_info.update(import_torch_s=torch_s, import_fastres_s=fastres_s)


@pytest.mark.parametrize("name", ["resnet50", "resnet152"])
def test_peak_memory(
    benchmark: BenchmarkFixture, name: str, network: Callable[[str], nn.Module]
) -> None:
    """Compiling and one call, over a process with the same imports and model that does nothing,
    and over one that has also exported a single convolution with torch.export.

    All resident memory, pages of shared libraries included (torch.export loads Triton's), which
    the kernel may drop and read again.
    """
    weights = sum(t.nbytes for t in network(name).state_dict().values())
    (peak,) = benchmark.pedantic(in_new_process, (PEAK, name, "compiled"), rounds=1)
    for baseline in ("idle", "exported"):
        (before,) = in_new_process(PEAK, name, baseline)
        over = peak - before
        benchmark.extra_info[f"mb_over_{baseline}"] = over / 1e6
        benchmark.extra_info[f"times_the_weights_over_{baseline}"] = over / weights
        print(
            f"{name}, over {baseline}: {over / 1e6:.0f} MB, {over / weights:.1f} times the weights"
        )
