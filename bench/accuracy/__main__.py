"""Top-1 of fp32, bf16 and int8 on real labelled pictures, with paired intervals and agreement.

python -m bench.accuracy                      # digits: 5 folds, two networks, clean and damaged
python -m bench.accuracy --quick              # the committed weights on their held-out fifth
python -m bench.accuracy --imagenet DIR --weights resnet50.safetensors --version v1.5
python -m bench.accuracy --parity             # SQNR by layer of settled ResNet-18, -50 and -152

The first trains ten networks, once, each on four fifths of scikit-learn's 1,797 digits; they are
kept under build/accuracy. Each is calibrated on pictures that it learnt from and judged by the
fifth that it has not seen, as it is and damaged in each way of examples/corruptions.py: 25,158
predictions a network and engine.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Pictures, digits
from torch import Tensor

from bench.accuracy.engines import (
    BACKENDS,
    Material,
    accuracy,
    answers,
    engines,
    normalised,
    refusals,
    remarks,
)
from bench.accuracy.nets import (
    RECIPES,
    VERSIONS,
    Trained,
    committed,
    trained_on_folds,
    versions,
)
from bench.accuracy.report import Report, Section, section
from bench.documents import check_output, headed
from fastres.calib.images import Preprocess
from fastres.cli.output import write_file
from fastres.errors import FastresError, InputError
from fastres.options import Input
from fastres.source import source_of
from fastres.text import json_text
from fastres.timing.machine import machine
from fastres.timing.peers_torch import torch_threads

OTHER_DAMAGE = 1000  # added to the seed: the pictures of `validate` are damaged in other ways


def on_digits(given: argparse.Namespace) -> Report:
    """Every network on every backend; the pictures of all its folds are one table."""
    everything = digits()
    sections, notes = [], []
    for name in given.networks.split(","):
        for backend in given.backends.split(","):
            trained = (
                iter(committed(name, everything))
                if given.quick
                else trained_on_folds(name, everything, given.folds, given.seed, given.epochs)
            )
            found, why = _measured(name, backend, trained, everything, given)
            sections += [found] if found else []
            notes += [line for line in why if line not in notes]
    shown = ("quick", "folds", "epochs", "seed", "calibration_images", "validation_images")
    settings = {key: getattr(given, key) for key in shown}
    return Report(machine(), settings, tuple(sections), tuple(notes))


def _measured(
    name: str,
    backend: str,
    trained: Iterator[Trained],
    everything: Pictures,
    given: argparse.Namespace,
) -> tuple[Section | None, list[str]]:
    """The section, or None and why there is none."""
    start = time.perf_counter()
    parts: list[dict[str, np.ndarray]] = []
    labels, notes = [], []
    for i, one in enumerate(trained):
        material = _material(one, given)
        pictures = versions(everything, one.held, given.seed + i)
        batches = flat(pictures, one.preprocess).split(given.batch_size)
        with ExitStack() as stack:
            found = engines(stack, material, backend, threads=given.threads, seed=given.seed)
            if not found.named:
                return None, refusals(found.refused, backend)
            classes = answers(found, batches)
        parts.append({k: v.reshape(len(VERSIONS), -1) for k, v in classes.items()})
        labels.append(everything.labels[one.held])
        notes += [f"network {i + 1}: {line}" for line in remarks(found)]
        notes += [line for line in refusals(found.refused, backend) if line not in notes]
        _say(f"{name} on {backend}, network {i + 1}: {time.perf_counter() - start:.0f} s")
    common = [key for key in parts[0] if all(key in part for part in parts)]
    whole = {key: np.concatenate([part[key] for part in parts], axis=1) for key in common}
    return section(name, backend, VERSIONS, whole, np.concatenate(labels), notes), []


def _material(one: Trained, given: argparse.Namespace) -> Material:
    """Calibration and validation pictures, both out of what the network learnt from."""
    counts = given.calibration_images, given.validation_images
    chosen, rest = drawn(len(one.training), *counts, given.seed)
    calibration = normalised(one.training.images[chosen], one.preprocess)
    validate = None
    if len(rest):
        seen = versions(one.training, rest, given.seed + OTHER_DAMAGE)
        batches = flat(seen, one.preprocess).split(given.batch_size)
        labels = np.tile(one.training.labels[rest], len(seen))
        validate = lambda engine: accuracy(engine, batches, labels)  # noqa: E731
    side = one.training.images.shape[1]
    graph = source_of(one.model, Input((1, 3, side, side))).graph
    return Material(graph, calibration, len(chosen), validate)


def drawn(count: int, calibration: int, validation: int, seed: int) -> tuple[np.ndarray, ...]:
    """Two disjoint sets of indices below `count`, ascending.

    Raises:
        InputError: there are fewer pictures than asked for.
    """
    if calibration + validation > count:
        raise InputError(
            f"there are {count} pictures to calibrate and to validate with, {calibration} and "
            f"{validation} were asked for: lower --calibration-images or --validation-images"
        )
    order = np.random.default_rng(seed).permutation(count)
    first, second, _ = np.split(order, np.cumsum((calibration, validation)))
    return np.sort(first), np.sort(second)


def flat(pictures: np.ndarray, preprocess: Preprocess) -> Tensor:
    """[versions, N, H, W, 3] uint8 -> [versions * N, 3, H, W] fp32, normalised."""
    return normalised(pictures.reshape(-1, *pictures.shape[2:]), preprocess)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="committed weights, one held-out fifth: seconds")
    add("--networks", default=",".join(RECIPES), help="of examples/weights, by comma")
    add("--backends", default=",".join(BACKENDS), help="those that cannot run are named")
    add("--folds", type=int, default=5)
    add("--epochs", type=int, help="of training; default: those of the committed weights")
    add("--calibration-images", type=int, default=512, metavar="N")
    add("--validation-images", type=int, metavar="N", help="for max_drop: 256; --quick: 0, without")
    add("--batch-size", type=int, default=128)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the engines")
    add("--seed", type=int, default=0, help="of folds, weights, damage and what is calibrated on")
    add("--imagenet", type=Path, metavar="DIR", help="DIR/val, with a folder for each class")
    add("--weights", type=Path, metavar="FILE", help="for --imagenet")
    add("--model", metavar="NAME", help="fastres:NAME, torchvision:NAME; default: from weights")
    add("--version", choices=["v1", "v1.5"], help="which net the weights are of")
    add("--resize", type=int, default=256, help="shorter side of ImageNet's pictures")
    add("--crop", type=int, default=224)
    add("--parity", action="store_true", help="settled networks instead: SQNR, cosine, top-1")
    add("--depths", default="18,50,152", help="for --parity")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("-o", "--output", type=Path, metavar="FILE", help="also write everything as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    _check(parser, given)
    started = time.time()
    if given.validation_images is None:
        given.validation_images = 0 if given.quick else 256
    with torch_threads(given.threads):
        report: Any
        if given.imagenet:
            from bench.accuracy.imagenet import on_imagenet

            report = on_imagenet(given)
        elif given.parity:
            from bench.accuracy.parity import on_settled

            report = on_settled(given)
        else:
            report = on_digits(given)
    document = {**headed("accuracy", started), **report.to_dict()}
    print(json_text(document) if given.json else report)
    if given.output is not None:
        write_file(given.output, json_text(document) + "\n")
    return 0


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Ends with status 2 where flags contradict each other or a number is out of range."""
    check_output(parser, given.output)
    modes = {"--quick": given.quick, "--imagenet": given.imagenet, "--parity": given.parity}
    if sum(map(bool, modes.values())) > 1:
        parser.error(f"choose one of {', '.join(modes)}")
    if bool(given.imagenet) != bool(given.weights):
        parser.error("--imagenet DIR and --weights FILE go together")
    least = {"folds": 2, "epochs": 1, "calibration_images": 1, "validation_images": 0, "seed": 0}
    for name, low in {**least, "batch_size": 1, "threads": 1, "resize": 1, "crop": 1}.items():
        value = getattr(given, name)
        if value is not None and value < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    for flag, known in (("networks", tuple(RECIPES)), ("backends", BACKENDS)):
        for name in getattr(given, flag).split(","):
            if name not in known:
                parser.error(f"--{flag} has {name!r}; there are {', '.join(known)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FastresError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
