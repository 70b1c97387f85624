"""The same table for ImageNet, or any other folders of labelled pictures, with your weights."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

import fastres
from bench.accuracy.engines import BACKENDS, Material, accuracy, answers, engines, refusals, remarks
from bench.accuracy.report import BASELINE, CLEAN, Report, Section, section
from fastres.calib.images import EXTENSIONS, Preprocess, batches
from fastres.cli.models import load_weights, make
from fastres.errors import BuildError, InputError
from fastres.graph.ir import Graph
from fastres.options import Input
from fastres.source import source_of
from fastres.text import progress_bar
from fastres.timing.machine import machine

AT_ONCE = 8  # pictures of one step of calibration


@dataclass(frozen=True)
class Files:
    """Pictures on disk, with their classes as numbers."""

    paths: tuple[Path, ...]
    labels: np.ndarray
    classes: int

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: np.ndarray) -> Files:
        return Files(tuple(self.paths[i] for i in rows), self.labels[rows], self.classes)


@dataclass(frozen=True)
class Loaded:
    """Batches of files, read anew each time that they are gone through."""

    files: Files
    preprocess: Preprocess
    batch: int
    bar: bool = False

    def __iter__(self) -> Iterator[Tensor]:
        with progress_bar("evaluating") as moved:
            done = 0
            for batch in batches(self.files.paths, self.preprocess, self.batch):
                yield batch
                done += len(batch)
                if self.bar:
                    moved(done, len(self.files))


def on_imagenet(given: argparse.Namespace) -> Report:
    """Calibrates on DIR/train, or on a part of DIR/val that is then not judged by; evaluates val.

    Raises:
        InputError: folders are missing, empty, or of other classes than the network's; a picture
            cannot be read (named).
        BuildError: the weights cannot be read or do not fit.
    """
    preprocess = Preprocess(resize=given.resize, crop=given.crop)
    judged, calibration, validation, where = parted(given)
    graph = network(given, judged.classes)
    batch, sections, notes = given.batch_size, list[Section](), list[str]()
    validate = None
    if len(validation):
        seen = Loaded(validation, preprocess, batch)
        validate = lambda engine: accuracy(engine, seen, validation.labels)  # noqa: E731
    calibrating = Loaded(calibration, preprocess, AT_ONCE)
    material = Material(graph, calibrating, len(calibration), validate)
    for backend in given.backends.split(","):
        with ExitStack() as stack:
            found = engines(stack, material, backend, threads=given.threads, seed=given.seed)
            notes += refusals(found.refused, backend)
            if found.named:
                classes = answers(found, Loaded(judged, preprocess, batch, bar=True))
                own = {name: rows[None] for name, rows in classes.items()}
                name = str(given.weights)
                said = [where, *remarks(found)]
                sections.append(section(name, backend, (CLEAN,), own, judged.labels, said))
    if not sections:
        raise InputError(f"no backend of {', '.join(BACKENDS)} could run {BASELINE}: {notes}")
    shown = ("imagenet", "weights", "model", "version", "resize", "crop", "seed")
    counts = {"calibration_images": len(calibration), "validation_images": len(validation)}
    settings = {key: getattr(given, key) for key in shown} | counts
    settings |= {key: str(settings[key]) for key in ("imagenet", "weights")}
    return Report(machine(), settings, tuple(sections), tuple(notes))


def parted(given: argparse.Namespace) -> tuple[Files, Files, Files, str]:
    """Files to judge by, to calibrate on and to validate with, disjoint; and that in words."""
    val = labelled(given.imagenet / "val")
    wanted = given.calibration_images, given.validation_images
    train = given.imagenet / "train"
    source = labelled(train) if train.is_dir() else val
    if source.classes != val.classes:
        raise InputError(
            f"{train} has {source.classes} classes and {given.imagenet / 'val'} {val.classes}; "
            "they must have the same folders"
        )
    order = np.random.default_rng(given.seed).permutation(len(source))
    if source is val and sum(wanted) >= len(val):
        raise InputError(
            f"{given.imagenet} has no train, and val has {len(val)} pictures: too few to take "
            f"{wanted[0]} for calibration and {wanted[1]} for validation out of them. Give a "
            "train folder, or fewer of them by --calibration-images and --validation-images"
        )
    first, second, rest = np.split(order, np.cumsum(wanted))
    judged = val if source is not val else val.take(np.sort(rest))
    calibration, validation = source.take(np.sort(first)), source.take(np.sort(second))
    where = f"calibrated on {len(calibration)} pictures of {'train' if judged is val else 'val'}"
    left = "" if judged is val else f"; judged by the other {len(judged)}"
    return judged, calibration, validation, where + left


def labelled(folder: Path) -> Files:
    """The pictures of a folder that has one folder for each class, in the order of their names.

    Raises:
        InputError: no such folder, fewer than two classes, or one without a picture.
    """
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}; --imagenet DIR needs DIR/val with a folder for each "
            "class, named so that their order is that of the network's outputs"
        )
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    if len(classes) < 2:
        raise InputError(
            f"{folder} holds {len(classes)} folders; expected one for each class. ImageNet's "
            "validation pictures come in one folder: sort them into one for each class first"
        )
    paths, labels = list[Path](), list[int]()
    for number, entry in enumerate(classes):
        own = sorted(f for f in entry.rglob("*") if f.suffix.lower() in EXTENSIONS and f.is_file())
        if not own:
            raise InputError(
                f"no picture in {entry}; looked for {', '.join(sorted(EXTENSIONS))}. Put some "
                "there: a folder left out would shift the numbers of all classes behind it"
            )
        paths += own
        labels += [number] * len(own)
    return Files(tuple(paths), np.array(labels), len(classes))


def network(given: argparse.Namespace, classes: int) -> Graph:
    """The network, captured, or built from its weights alone.

    Raises:
        BuildError: no such weights, or they do not fit.
        InputError: there is no such model, or it has another number of classes.
    """
    shape = Input((1, 3, given.crop, given.crop))
    if given.model is None:
        graph = fastres.build(given.weights, version=given.version, inputs=shape)
    else:
        name = given.model if ":" in given.model else f"fastres:{given.model}"
        model = make(name, given.version)
        load_weights(model, name, given.weights)
        graph = source_of(model, shape).graph
    last = graph.spec(graph.outputs[0]).shape
    if len(graph.outputs) != 1 or len(last) != 2:
        raise BuildError(f"{given.weights} gives {last}; expected logits [N, classes]")
    if last[1] != classes:
        raise InputError(
            f"{given.weights} tells {last[1]} classes apart, {given.imagenet / 'val'} has "
            f"{classes} folders; there must be one for each, in the order of the outputs"
        )
    return graph
