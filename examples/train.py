"""Train a residual network: a small one in minutes, without a GPU, on digits.

    python examples/train.py                                   # digits, resnet20, CIFAR recipe
    python examples/train.py --model bottleneck --recipe nvidia --epochs 30
    python examples/train.py --data cifar-10-batches-bin       # CIFAR-10's binary version
    python examples/train.py --data flowers --from WEIGHTS.safetensors --train head
    python examples/train.py --folds 5 --fold 0                # leaves the first fifth for the test
    python examples/train.py --from WEIGHTS.safetensors --epochs 0 --corrupted   # evaluates only

The digits lie in examples/digits. Weights go to a .safetensors file that `fastres.build` and the
command line read; with them go mean and std, which deployment needs too.
The last line of the output is a JSON object. On the CPU the same command with the same number of
threads writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from corruptions import KINDS, corrupted
from datasets import Data, Pictures, folds, load, split
from networks import Part, facts_of, freeze, network, preprocess_of, save, take_over
from recipes import RECIPES, Recipe
from torch import nn
from training import batch_size, evaluate, statistics, train

from fastres.calib.images import Preprocess
from fastres.errors import FastresError, InputError


@dataclass(frozen=True)
class Parts:
    """Disjoint pictures: to learn from, to watch while learning, and for the test."""

    training: Pictures
    validation: Pictures | None
    test: Pictures | None
    how: str


def parted(data: Data, recipe: Recipe, args: argparse.Namespace) -> Parts:
    """A validation part of a fifth; with folds, the test is a fold that no decision looks at."""
    said = f"{args.validation:g} of each class, seed {args.seed}"
    if args.folds is None:
        rows, held = split(data.train.labels, args.validation, args.seed)
        parts = data.train.take(rows), data.train.take(held)
        return Parts(*parts, data.test, f"validation is {said}")
    if args.fold is None or not 0 <= args.fold < args.folds:
        raise InputError(f"--fold is {args.fold}; with --folds {args.folds} give 0 to one less")
    fold = folds(data.train.labels, args.folds, args.seed)[args.fold]
    rest = data.train.take(np.setdiff1d(np.arange(len(data.train)), fold))
    test, how = data.train.take(fold), f"test is fold {args.fold} of {args.folds}, seed {args.seed}"
    if recipe.patience is None:
        return Parts(rest, None, test, how)
    rows, held = split(rest.labels, args.validation, args.seed)
    return Parts(rest.take(rows), rest.take(held), test, f"{how}; validation is {said} of the rest")


def results(
    model: nn.Module, parts: Parts, preprocess: Preprocess, *, damaged: int | None = None
) -> dict[str, object]:
    """Accuracy on what was not learnt from; with a seed in `damaged`, on corruptions of it too."""
    found: dict[str, object] = {}
    for name, part in (("validation", parts.validation), ("test", parts.test)):
        if part is None:
            continue
        one: dict[str, object] = {
            "pictures": len(part),
            "accuracy": round(evaluate(model, part, preprocess)[0], 6),
        }
        if damaged is not None:
            rates = {}
            for kind in KINDS:
                worse = replace(part, images=corrupted(part.images, kind, damaged))
                rates[kind] = round(evaluate(model, worse, preprocess)[0], 6)
            one["corrupted"] = {"mean": round(float(np.mean(list(rates.values()))), 6), **rates}
        found[name] = one
    return found


def main() -> int:
    """Trains as the flags say, writes the weights, prints what came of it as one line of JSON."""
    args = _arguments()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    source = facts_of(args.source) if args.source else {}
    data, recipe = load(args.data, args.size), _recipe(args)
    parts = parted(data, recipe, args)
    recipe = replace(recipe, batch=args.batch_size or batch_size(recipe, len(parts.training)))
    name = args.model or source.get("model", "resnet20")
    model = network(name, len(data.train.classes), args.seed)
    if args.source and take_over(model, args.source, new_head=args.part == "head"):
        _note(f"the head is new, for {len(data.train.classes)} classes")
    if source.get("data") == data.name and source.get("parts") != parts.how:
        _note(f"{args.source} learnt from other parts of this data: {source.get('parts')}")
    # Taken-over weights expect what they were trained with, BatchNorm's statistics above all.
    preprocess = preprocess_of(source) or statistics(parts.training)
    out = args.out or Path(f"{data.name}_{name.rpartition(':')[2]}.safetensors")
    start = time.perf_counter()
    kept = train(
        model,
        parts.training,
        recipe,
        preprocess,
        validation=parts.validation,
        batch=recipe.batch,
        mirror=args.flip,
        seed=args.seed,
        frozen=freeze(model, args.part),
        report=_note if sys.stderr.isatty() else None,
    )
    seconds = time.perf_counter() - start
    facts: dict[str, object] = {
        "model": name,
        "recipe": asdict(recipe),
        "data": data.name,
        "classes": parts.training.classes,
        "seed": args.seed,
        "parts": parts.how,
        "epoch": kept,
        **results(model, parts, preprocess, damaged=args.seed if args.corrupted else None),
    }
    written = None
    if kept:
        save(model, out, preprocess, facts)
        written = str(out)
    shown = {**facts, "seconds": round(seconds, 1), "weights": written}
    print(json.dumps(shown))
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    recipe = RECIPES[args.recipe]
    if args.optimizer == "adam":
        recipe = replace(recipe, optimizer="adam", lr=1e-3, lr_batch=None)
    if args.lr is not None:
        recipe = replace(recipe, lr=args.lr, lr_batch=None)
    given = {"epochs": args.epochs, "mixup": args.mixup}
    return replace(recipe, **{name: v for name, v in given.items() if v is not None})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="PATH", help="CIFAR-10's .bin batches, or a folder a class")
    add("--size", type=int, default=32, help="pixels of a side of digits and folders' pictures")
    add("--model", help="resnet20, bottleneck or fastres:NAME; default: that of --from, resnet20")
    add("--recipe", choices=sorted(RECIPES), default="cifar")
    add("--epochs", type=int, help="default: the recipe's, 90")
    add("--batch-size", type=int, help="default: the recipe's, or less for few pictures")
    add("--optimizer", choices=["sgd", "adam"], default="sgd", help="adam: at a rate of 0.001")
    add("--lr", type=float, help="learning rate, as it is for any batch size")
    add("--mixup", type=float, metavar="ALPHA", help="0 mixes nothing: better in short trainings")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror half; not digits by default")
    add("--validation", type=float, default=0.2, metavar="RATIO", help="share of the pictures")
    add("--folds", type=int, metavar="K", help="test on one of K parts instead of the data's own")
    add("--fold", type=int, metavar="I", help="which part, from 0")
    add("--from", dest="source", type=Path, metavar="WEIGHTS", help="start with these weights")
    add("--train", dest="part", choices=get_args(Part), default="all", help="the rest is frozen")
    add("--seed", type=int, default=0, help="of weights, parts, order, crops and corruptions")
    add("--threads", type=int, help="default: PyTorch's choice")
    add("--corrupted", action="store_true", help="accuracy on damaged pictures too")
    add("--out", type=Path, help="default: DATA_MODEL.safetensors here; none with --epochs 0")
    args = parser.parse_args()
    if args.fold is not None and args.folds is None:
        parser.error("--fold needs --folds K")
    if args.part != "all" and args.source is None:
        parser.error(f"--train {args.part} needs --from: an untrained layer must not be frozen")
    bounds = {"epochs": 0, "batch_size": 2, "seed": 0, "mixup": 0, "threads": 1, "size": 8}
    for name, least in bounds.items():
        if (given := getattr(args, name)) is not None and given < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {given}")
    return args


def _note(text: object) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FastresError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
