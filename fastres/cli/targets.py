"""From a `Request` to something that runs: a model or a saved engine, opened and compiled."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.cli import models
from fastres.cli.flags import NAMES, Request
from fastres.cli.output import note, working
from fastres.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastres.calib.images import Preprocess
    from fastres.engine.engine import Engine
    from fastres.graph.ir import Graph
    from fastres.models.blocks import Version
    from fastres.options import Input

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Target:
    """A model, a graph built from weights, or a saved engine; and the image it takes.

    Args:
        name: what the user called it.
        shape: (C, H, W) of an image.
        untrained: the weights are random: fit for timing, not for looking at results. None where
            nobody knows, as of a saved engine.
    """

    name: str
    model: nn.Module | Graph | Engine
    shape: Shape
    dtype: torch.dtype
    untrained: bool | None = False

    @property
    def normalises(self) -> bool:
        """Whether it is an engine that takes decoded pictures, uint8 [N, H, W, 3]."""
        from fastres.engine.engine import Engine

        return isinstance(self.model, Engine) and self.model.io_dtype is not None


def split(positionals: Sequence[str], weights: Path | None) -> tuple[str | None, list[str]]:
    """Takes the model off the positional arguments; with --weights it may be left out.

    Raises:
        InputError: there is neither a model nor weights.
    """
    first, rest = (positionals[0], list(positionals[1:])) if positionals else (None, [])
    if weights is None and first is None:
        raise InputError(f"give a model ({NAMES}, or a saved engine's path), or --weights")
    if weights is not None and first is not None and not models.is_name(first):
        return None, [first, *rest]
    return first, rest


def open_target(request: Request) -> Target:
    """Makes the model, builds it from weights, or loads the engine.

    Raises:
        InputError: no such model or path, or a flag that does not go with it.
        BuildError, ArtifactError, BackendUnavailable: see `fastres.build`, `fastres.load`, `make`.
    """
    if request.model is not None and is_saved(request.model):
        return _saved(request, Path(request.model))
    return open_model(request)


def is_saved(name: str) -> bool:
    """Whether a target is a path, and so a saved engine."""
    return os.path.exists(name)


def open_model(request: Request) -> Target:
    """Makes the model or builds it from weights: `open_target`, but for saved engines.

    Raises:
        InputError: no such model, a path, or a flag that does not go with the model.
        BuildError, BackendUnavailable: see `fastres.build`, `make`.
    """
    if request.model is not None and is_saved(request.model):
        raise InputError(
            f"{request.model} is a file or folder; this must be a model, {NAMES}, or --weights"
        )
    if request.trust_engine and (request.model is None or models.is_name(request.model)):
        raise InputError(
            f"--trust-engine is for saved engines; {request.model or request.weights} is compiled "
            "here: leave it out"
        )
    if request.entry is not None and request.weights is None:
        raise InputError("--entry says where in the file of --weights they lie: give both")
    if request.max_bytes is not None and request.weights is None:
        raise InputError("--max-bytes is for what --weights, or a saved engine, may take: give one")
    with working(f"reading {request.model or request.weights}"):
        version = models.as_version(request.version)
        if request.model is not None:
            return _named(request, request.model, version)
        if request.weights is None:
            raise InputError(f"give a model ({NAMES}, or a saved engine's path), or --weights")
        return _built(request, request.weights, version)


def to_engine(target: Target, request: Request, preprocess: Preprocess | None = None) -> Engine:
    """The target compiled as asked; a saved engine as it is."""
    import fastres
    from fastres.engine.engine import Engine
    from fastres.graph.ir import Graph

    if isinstance(target.model, Engine):
        return target.model
    given: dict[str, Any] = {
        "precision": request.precision,
        "calibration": request.calibration,
        "device": request.device,
        "threads": request.threads,
        "preprocess": preprocess,
        "backend": ("auto" if request.backend is None else request.backend).split(","),
        "on_unsupported": request.on_unsupported or "error",
        "target": request.target,
        "tune": bool(request.tune),
        "cache_dir": request.cache_dir,
    }
    inputs = (
        None if isinstance(target.model, Graph) else image_input(target.shape, request.batch_sizes)
    )
    # tuning has a bar of its own, and a terminal takes one display at a time
    with nullcontext() if request.tune else working(f"compiling {target.name}"):
        engine = fastres.compile(target.model, inputs, **given)
    if request.tune and engine.backend.name != "triton":
        note(f"nothing was tuned: {target.name} runs on {engine.backend.name}, which has no tiles")
    return engine


def precision_ran(engine: Engine) -> str:
    """What its nodes were compiled to run in, most frequent first, such as "bf16, fp32"."""
    return ", ".join(engine.info.precisions) or engine.info.precision


def warn_if_untrained(target: Target) -> None:
    if target.untrained:
        note(f"untrained weights: {target.name} has random weights, what it says means nothing")


def _saved(request: Request, path: Path) -> Target:
    import fastres
    from fastres.checkpoints.files import SUFFIXES

    if path.suffix in SUFFIXES:
        raise InputError(f"{path} holds weights, not an engine; give it as --weights {path}")
    wrong = request.only_for_models()
    if wrong:
        raise InputError(
            f"{path} is a saved engine, compiled once and for all: {', '.join(wrong)} cannot be "
            "given with it; compile the model again"
        )
    with working(f"loading {path}"):
        engine = fastres.load(
            path,
            device=request.device,
            target=request.target,
            trust_engine=bool(request.trust_engine),
            max_bytes=request.max_bytes,
        )
    return engine_target(engine, str(path), request.image_size)


def engine_target(engine: Engine, name: str, image_size: int | None = None) -> Target:
    """The target that an engine is."""
    channels, height, width = engine.inputs[0].usual[1:]
    shape = (channels, image_size or height, image_size or width)
    return Target(name, engine, shape, engine.graph.inputs[0].spec.torch_dtype, untrained=None)


def _named(request: Request, name: str, version: Version | None) -> Target:
    import torch

    model = models.make(name, version)
    if request.weights is not None:
        models.load_weights(model, name, request.weights, request.entry, request.max_bytes)
    size = request.image_size or (32 if models.is_cifar(name) else 224)
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = next(dtypes, torch.float32)
    untrained = request.weights is None and models.is_fresh(model)
    return Target(name, model, (3, size, size), dtype, untrained)


def _built(request: Request, weights: Path, version: Version | None) -> Target:
    import fastres
    from fastres.options import Input

    size = request.image_size
    image = None if size is None else Input((1, 3, size, size))
    graph = fastres.build(
        weights,
        version=version,
        inputs=image,
        entry=request.entry,
        max_bytes=request.max_bytes,
    )
    channels, height, width = (int(str(d)) for d in graph.inputs[0].spec.shape[1:])
    spec = graph.inputs[0].spec
    return Target(str(weights), graph, (channels, height, width), spec.torch_dtype)


def image_input(shape: Shape, batch_sizes: tuple[int, ...]) -> Input:
    from fastres.options import Input

    low, usual, high = min(batch_sizes), batch_sizes[0], max(batch_sizes)
    return Input(((low, *shape), (usual, *shape), (high, *shape)))
