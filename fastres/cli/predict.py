"""fastres predict: what a network sees in pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fastres.calib.files import read_regular
from fastres.cli import flags
from fastres.cli.flags import Request
from fastres.cli.output import emit, note, working
from fastres.cli.pictures import adjusted, preprocess_for
from fastres.cli.targets import open_target, split, to_engine, warn_if_untrained
from fastres.errors import InputError
from fastres.wording import LINE, named

if TYPE_CHECKING:
    from fastres.engine.engine import Engine
    from fastres.engine.predict import OnError, Prediction

_MOST_LABELS = 1 << 24  # bytes


@flags.takes_request()
def predict(
    positionals: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL IMAGES...",
            help=f"{flags.NAMES}, or a saved engine's path; then image files or folders of them. "
            "MODEL may be left out where --weights is given.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 5,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Names of the classes, one a line.")
    ] = None,
    resize: flags.Resize = None,
    crop: flags.Crop = None,
    mean: flags.Mean = None,
    std: flags.Std = None,
    exif: flags.Exif = None,
    max_pixels: flags.MaxPixels = None,
    on_error: Annotated[
        str,
        typer.Option(
            metavar="raise|row",
            help="At an image that cannot be taken: stop, or say so in its row and go on.",
        ),
    ] = "raise",
    *,
    request: Request,
    as_json: flags.Json = False,
    output: flags.Output = None,
) -> None:
    """Classify images.

    They are decoded, resized, cropped and normalised as in training.
    """
    model, paths = split(positionals or (), request.weights)
    images = _images(paths)
    request = request.about(model, default_batch=min(8, len(images)))
    request = replace(request, image_size=request.image_size or crop)
    names = None if labels is None else _labels(labels)
    target = open_target(request)
    warn_if_untrained(target)
    engine = to_engine(target, request)
    start = engine.preprocess or preprocess_for(target.shape)
    engine.preprocess = adjusted(
        start, resize=resize, crop=crop, mean=mean, std=std, exif=exif, max_pixels=max_pixels
    )
    _check_labels(names, labels, engine)
    with working(f"looking at {len(images)} images"):
        found = engine.predict(
            images,
            batch_size=max(request.batch_sizes),
            top_k=top_k,
            on_error=cast("OnError", on_error),
        )
    if failed := sum(bool(row.error) for row in found):
        note(f"{failed} of {len(images)} images could not be taken")
    rows = _rows(images, found, names)
    fields = {"model": target.name, "untrained": target.untrained, "predictions": rows}
    emit("predict", _table(rows), fields, as_json=as_json, output=output)


def _images(paths: Sequence[str]) -> list[Path]:
    from fastres.calib.images import find_images

    if not paths:
        raise InputError("give the images to classify: files, or folders of them")
    try:
        return [image for path in paths for image in find_images(path)]
    except ValueError as error:
        raise InputError(str(error)) from error


def _labels(file: Path) -> list[str]:
    try:
        return read_regular(file, _MOST_LABELS).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--labels {file} cannot be read: {error}") from error


def _check_labels(names: list[str] | None, file: Path | None, engine: Engine) -> None:
    classes = engine.graph.spec(engine.graph.outputs[0]).shape[-1]
    if names is not None and isinstance(classes, int) and len(names) != classes:
        raise InputError(f"--labels {file} has {len(names)} lines, the network {classes} classes")


def _rows(
    images: Sequence[Path], found: Sequence[Prediction], names: list[str] | None
) -> list[dict[str, Any]]:
    return [
        {
            "image": str(image),
            "error": p.error or None,
            "top": [
                {"class": index, "label": names[index] if names else None, "probability": chance}
                for index, chance in zip(p.classes, p.probabilities, strict=True)
            ],
        }
        for image, p in zip(images, found, strict=True)
    ]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        lines.append(named(row["image"], LINE))
        if row["error"]:
            lines.append(f"  {row['error']}")
        for best in row["top"]:
            label = "" if best["label"] is None else f"  {best['label']}"
            lines.append(f"  {best['probability']:7.2%}  {best['class']:>5}{label}")
    return "\n".join(lines)
