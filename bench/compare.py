"""fastres and its peers on the CPU, interleaved in one run: the table that the README quotes.

python bench/compare.py [--model resnet50] [--precision fp32,bf16] [--batch-size 1,8] [-o FILE.json]

Every target is checked against float64 first; one whose numbers are wrong is given no speed. The
exit status is 1 if that one is ours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import fastres
from fastres import models
from fastres.bench_report import BenchReport
from fastres.benchmarking import Target, benchmark
from fastres.calib.images import Preprocess, find_images
from fastres.peers import PEERS, contenders, torch_threads

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"
OURS = "fastres"


def photographs(batch_size: int, image_size: int) -> Tensor:
    """[N, 3, H, W] fp32: the example photographs in turn, normalised."""
    preprocess = Preprocess(resize=image_size * 256 // 224, crop=image_size)
    pictures = preprocess.batch(find_images(PHOTOS))
    return pictures[torch.arange(batch_size) % len(pictures)]


def settled(name: str, image_size: int) -> nn.Module:
    """`resnet50`, or `cifar_resnet:20` for one that takes a depth, settled on the photographs."""
    factory, _, depth = name.partition(":")
    arguments = (int(depth),) if depth else ()
    model: nn.Module = getattr(models, factory)(*arguments, seed=0)
    return models.settle(model, photographs(3, image_size))


def verdicts(report: BenchReport) -> list[str]:
    """One line for each peer and batch size: how fast we are beside it."""
    lines = []
    for m in report.measurements:
        if m.target != OURS:
            own = report.against(m.target).of(OURS, m.batch_size).speedup
            lines.append(
                f"batch {m.batch_size}, {m.precision}: fastres is {own} as fast as {m.target}"
            )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="of fastres.models; cifar_resnet:20")
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--batch-size", default="1,8")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--baseline", default="eager", help="what the table's ratios refer to")
    parser.add_argument("--duration", type=float, default=3.0, help="seconds for each target")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="also write everything as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    model = settled(given.model, given.image_size)
    sizes = [int(size) for size in given.batch_size.split(",")]
    examples = {size: photographs(size, given.image_size) for size in sizes}
    example = examples[sizes[0]]
    runs, failed = [], False
    with torch_threads(given.threads):
        for precision in given.precision.split(","):
            engine = fastres.compile(
                model, example, backend="cpu", precision=precision, threads=given.threads
            )
            targets, refused = contenders(
                given.peers.split(","),
                model,
                examples,
                ours=[Target(OURS, engine)],
                precision=precision,
                threads=given.threads,
            )
            failed = failed or OURS in refused
            for name, reason in refused.items():
                print(f"not timed, {name} in {precision}: {reason}", file=sys.stderr)
            timed = [target.name for target in targets]
            if not timed:
                continue
            baseline = given.baseline if given.baseline in timed else None
            report = benchmark(
                targets, examples, duration_s=given.duration, baseline=baseline, seed=given.seed
            )
            print(f"{given.model} in {precision}\n{report}", flush=True)
            if OURS in timed:
                print("\n".join(verdicts(report)))
            runs.append({"precision": precision, "refused": refused, **report.to_dict()})
    if given.output is not None:
        figures = {"model": given.model, "image_size": given.image_size, "runs": runs}
        given.output.write_text(json.dumps(figures, indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
