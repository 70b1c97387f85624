"""Int8 on the CPU beside its peers: time to calibrate, memory, and speed, all on one network.

python -m bench.cpu.int8 [--model resnet50] [--images 128] [--batch-size 8] [-o FILE.json]

Peers are OpenVINO with NNCF's post-training quantisation (per-channel weights, symmetric or not as
NNCF chooses for the processor) and ONNX Runtime's static quantisation (QDQ, int8, per channel),
both given the same images; and fastres in fp32 and bf16. The clock of calibrating starts where
each has the network as it reads it, fastres a graph and the peers an ONNX file, and ends after the
first answer in int8. Speeds are interleaved in one run. Each int8 engine's SQNR against fp32 stands
beside its speed; the network is settled, not trained, so that says how the numbers are kept, not
how accurate a trained network would be.

NNCF is no part of the dev extra: pip install nncf.

Source of the peers' settings: their documentation of post-training quantisation.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor, nn

import fastres
from bench.documents import check_output, headed
from bench.pictures import PHOTOS
from fastres.assembly.assemble import optimised
from fastres.calib.images import Preprocess, find_images
from fastres.cli.output import write_file
from fastres.errors import CaptureError
from fastres.options import Input
from fastres.quantization.calibrate import collect
from fastres.source import source_of
from fastres.text import json_text, render
from fastres.timing.benchmark import Target, benchmark
from fastres.timing.peers_exported import (
    OrtSession,
    in_openvino,
    nncf_quantised,
    onnx_bytes,
    ort_quantised,
)
from fastres.timing.peers_torch import torch_threads
from fastres.tolerances import Distance

SIZE = 224


def photographs(count: int, seed: int = 0) -> Tensor:
    """[N, 3, 224, 224] fp32: square cuts from the example photographs, normalised."""
    draw = np.random.default_rng(seed)
    preprocess = Preprocess(resize=SIZE, crop=SIZE)
    pictures = [Image.open(path).convert("RGB") for path in find_images(PHOTOS)]
    cuts = []
    for i in range(count):
        picture = pictures[i % len(pictures)]
        side = int(min(picture.size) * draw.uniform(0.4, 1.0))
        left, top = (int(draw.integers(0, length - side + 1)) for length in picture.size)
        cuts.append(picture.crop((left, top, left + side, top + side)))
    return preprocess.batch(cuts)


@dataclass(frozen=True)
class Contender:
    """A quantised network that can be called, and the seconds that making it took."""

    name: str
    run: Callable[[Tensor], Tensor]
    seconds: float


def settled(name: str, images: Tensor) -> nn.Module:
    model: nn.Module = getattr(fastres.models, name)(seed=0)
    return fastres.models.settle(model, images[:8])


def ours(model: nn.Module, images: Tensor, threads: int) -> Contender:
    graph = source_of(model, Input((1, 3, SIZE, SIZE))).graph
    start = time.perf_counter()
    table = fastres.quantize(graph, images, algorithm="mse", num_samples=len(images))
    engine = fastres.compile(graph, backend="cpu", calibration=table, threads=threads)
    engine(images[:1])
    return Contender("fastres int8", engine, time.perf_counter() - start)


def nncf(model: nn.Module, images: Tensor, threads: int) -> Contender:
    """OpenVINO's model of the network, quantised by NNCF, in OpenVINO."""
    network = onnx_bytes(model, images[:1], folded=True)
    start = time.perf_counter()
    run = in_openvino(nncf_quantised(network, images), "int8", threads)
    run(images[:1])
    return Contender("NNCF + OpenVINO int8", run, time.perf_counter() - start)


def onnxruntime(model: nn.Module, images: Tensor, threads: int) -> Contender:
    network = onnx_bytes(model, images[:1], folded=True)
    start = time.perf_counter()
    run = OrtSession(ort_quantised(network, images), threads)
    run(images[:1])
    return Contender("ONNX Runtime int8", run, time.perf_counter() - start)


def peak_of_calibration(name: str, images: int) -> float:
    """MiB above what a process that has calibrated with 8 images holds, in one of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_calibrate_alone, (name, images))


def _calibrate_alone(name: str, images: int) -> float:
    few = photographs(8)
    model = settled(name, few)
    source = source_of(model, Input((1, 3, SIZE, SIZE)))
    graph = optimised(source.graph, CaptureError)
    collect(graph, source.inputs, [(few,)], "mse")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    batches = ((few,) for _ in range(images // 8))
    collect(graph, source.inputs, batches, "mse")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    check_output(parser, given.output)
    started = time.time()
    images = photographs(given.images)
    model = settled(given.model, images)
    examples = {n: photographs(n, seed=1) for n in map(int, given.batch_size.split(","))}
    with torch_threads(given.threads):
        makers = (ours, nncf, onnxruntime)
        seconds: dict[str, list[float]] = {}
        found: dict[str, Contender] = {}
        for _ in range(given.rounds):  # in turn, so that what disturbs one disturbs all
            for make in makers:
                made = make(model, images, given.threads)
                seconds.setdefault(made.name, []).append(made.seconds)
                found[made.name] = made
                gc.collect()
        with torch.no_grad():
            exact = model.double()(images.double()[:64])
        model.float()
        floats = [
            Target(
                f"fastres {precision}",
                fastres.compile(
                    model, images[:1], backend="cpu", precision=precision, threads=given.threads
                ),
                precision,
            )
            for precision in ("fp32", "bf16")
            if precision == "fp32" or _has_bf16()
        ]
        report = benchmark(
            [*(Target(c.name, c.run, "int8") for c in found.values()), *floats],
            examples,
            duration_s=given.duration,
            baseline="fastres int8",
            seed=0,
        )
        quality = {c.name: _sqnr(c.run, images[:64], exact) for c in found.values()}
    print(_calibration_table(given, seconds, quality))
    print(report, flush=True)
    memory = {}
    for n in given.memory:
        memory[n] = peak_of_calibration(given.model, n)
        print(f"peak memory of calibrating with {n} images: {memory[n]:.0f} MiB above that with 8")
    if given.output is not None:
        figures = {
            **headed("int8", started),
            "model": given.model,
            "images": given.images,
            "calibration_seconds": seconds,
            "sqnr_db": quality,
            "memory_mib": memory,
            **report.to_dict(),
        }
        write_file(given.output, json_text(figures) + "\n")
    return 0


def _has_bf16() -> bool:
    from fastres.backends.cpu import CpuBackend

    return CpuBackend().precision("bf16") is None


def _sqnr(run: Callable[[Tensor], Tensor], images: Tensor, exact: Tensor) -> float:
    distance = Distance()
    for x, y in zip(images.split(8), exact.split(8), strict=True):
        distance.add(run(x).clone(), y)
    return distance.sqnr_db


def _calibration_table(
    given: argparse.Namespace, seconds: dict[str, list[float]], quality: dict[str, float]
) -> str:
    title = f"{given.model}, calibrated with {given.images} images on {given.threads} threads"
    table = Table(title=title)
    for column in ("", "calibrated and compiled, s (median)", "of ours", "SQNR dB"):
        table.add_column(column, justify="left" if not column else "right")
    own = statistics.median(seconds["fastres int8"])
    for name, times in seconds.items():
        median = statistics.median(times)
        table.add_row(name, f"{median:.1f}", f"{median / own:.2f}", f"{quality[name]:.1f}")
    return render(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.int8", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="resnet50", help="of fastres.models")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch-size", default="8")
    parser.add_argument("--duration", type=float, default=3.0, help="seconds for each target")
    parser.add_argument("--rounds", type=int, default=3, help="times that each calibrates")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--memory", type=lambda text: [int(n) for n in text.split(",")], default=[128, 1024]
    )
    parser.add_argument("-o", "--output", type=Path, help="also write everything as JSON")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
