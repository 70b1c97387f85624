"""`engine.predict`: from pictures to classes, batch by batch, each picture answered for itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch

from fastres.calib.decoding import called
from fastres.calib.images import ImageLike, Preprocess
from fastres.deadlines import Deadline
from fastres.engine.inputs import Taken
from fastres.errors import InputError
from fastres.graph.ir import Graph, Normalize
from fastres.options import integer
from fastres.wording import message

OnError = Literal["raise", "row"]


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first; none, and an error, where it has none."""

    classes: tuple[int, ...]
    probabilities: tuple[float, ...]
    error: str = ""


class Classifier(Protocol):
    """Of an engine, what predicting needs."""

    preprocess: Preprocess | None

    @property
    def graph(self) -> Graph: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def io_dtype(self) -> torch.dtype | None: ...

    @property
    def accepted(self) -> tuple[Taken, ...]: ...

    def mapped(
        self, batches: Iterable[torch.Tensor], depth: int, deadline: Deadline | None
    ) -> Iterator[Any]: ...


def predict(
    engine: Classifier,
    images: Sequence[ImageLike],
    batch_size: int,
    top_k: int,
    on_error: OnError,
    deadline: Deadline | None = None,
) -> list[Prediction]:
    """See `Engine.predict`."""
    preprocess = _preprocess(engine)
    batch_size, top_k = integer("batch_size", batch_size), integer("top_k", top_k)
    if on_error not in get_args(OnError):
        raise InputError(f"on_error is {on_error!r}; give 'raise', or 'row' to go on")
    if isinstance(images, str) or not isinstance(images, Sequence):
        kind = type(images).__name__
        raise InputError(f"images is {kind}; give a list of images, [image] for one")
    found: dict[int, Prediction] = {}
    under_way: deque[list[int]] = deque()  # which images the batches are of

    def batches() -> Iterator[torch.Tensor]:
        for start in range(0, len(images), batch_size):
            taken = _Pictures(engine, preprocess, on_error)
            for number in range(start, min(start + batch_size, len(images))):
                taken.add(images[number], number)
            found.update(taken.refused)
            for numbers, pictures in taken.by_size:
                under_way.append(numbers)
                yield pictures.to(engine.device)

    try:
        for logits in engine.mapped(batches(), 2, deadline):
            if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
                raise InputError("predict needs a network that returns one [N, classes] tensor")
            best = logits.float().softmax(1).topk(min(top_k, logits.shape[1]))
            rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            for number, (classes, chances) in zip(under_way.popleft(), rows, strict=True):
                found[number] = Prediction(tuple(classes), tuple(chances))
    except ValueError as error:
        raise InputError(str(error)) from error
    return [found[number] for number in range(len(images))]


def _preprocess(engine: Classifier) -> Preprocess:
    preprocess, fused = engine.preprocess, engine.graph.normalize
    if preprocess is None:
        raise InputError("this engine has no preprocess: compile with preprocess=Preprocess(...)")
    if fused is not None and fused.op != Normalize.of(preprocess):
        raise InputError(
            f"this engine was compiled to normalise by {fused.op}, its preprocess says "
            f"{Normalize.of(preprocess)}: compile it again to change these"
        )
    return preprocess


class _Pictures:
    """Some images as inputs: those of one size together, and what is to be said of the others."""

    def __init__(self, engine: Classifier, preprocess: Preprocess, on_error: OnError) -> None:
        self.refused: dict[int, Prediction] = {}
        self._preprocess, self._on_error = preprocess, on_error
        self._normalise = engine.io_dtype is None
        self._accepted = engine.accepted[0]
        self._sized: dict[torch.Size, dict[int, torch.Tensor]] = {}

    def add(self, image: ImageLike, number: int) -> None:
        """
        Raises:
            ValueError: it cannot be taken, and nothing else was asked for.
        """
        try:
            pixels = self._preprocess.numbered(image, number, normalise=self._normalise)
            if not self._accepted.takes(pixels.shape):
                name = called(image) if isinstance(image, str | Path) else f"image {number}"
                raise ValueError(
                    f"{name} is {list(pixels.shape)} after preprocessing, expected "
                    f"[{self._accepted.sizes}]; set resize and crop to what the engine takes"
                )
        except ValueError as error:
            if self._on_error == "raise":
                raise
            self.refused[number] = Prediction((), (), message(str(error)))
            return
        self._sized.setdefault(pixels.shape, {})[number] = pixels

    @property
    def by_size(self) -> Iterator[tuple[list[int], torch.Tensor]]:
        """The numbers of images of one size, with the batch that they make."""
        for together in self._sized.values():
            yield list(together), torch.stack(list(together.values()))
