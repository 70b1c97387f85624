"""fastres calibrate: a model and images into the table that int8 needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastres.calib.files import open_regular
from fastres.cli import flags
from fastres.cli.flags import Request
from fastres.cli.output import emit, note
from fastres.cli.pictures import adjusted, preprocess_for
from fastres.cli.targets import Target, image_input, open_model, split, warn_if_untrained
from fastres.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from fastres.calib.images import Preprocess
    from fastres.calib.table import CalibrationTable
    from fastres.engine.engine import Engine

_UNUSED = ("precision", "calibration", "batch_size", "device", "threads", "on_unsupported")


@flags.takes_request(without=(*_UNUSED, "tune", "cache_dir", "trust_engine"))
def calibrate(
    positionals: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL DATA",
            help=f"{flags.NAMES}; may be left out where --weights is given. Then a folder of "
            "images, or a .npy file of inputs as the model takes them, float [N, C, H, W].",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the table there."),
    ] = None,
    algorithm: Annotated[
        str,
        typer.Option(
            help="auto, minmax, percentile (99.99), percentile-99.9, entropy or mse. auto takes "
            "the most accurate with --val, else the one with the least noise in the outputs of the "
            "median image."
        ),
    ] = "auto",
    samples: Annotated[int, typer.Option(min=1, help="Images to look at.")] = 512,
    ignore: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Layers to leave in floating point: conv1,layer4.*"),
    ] = None,
    val: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Labelled images, a folder for each class, in the order of their names: measures "
            "top-1 accuracy before and after.",
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="How much of that accuracy int8 may cost, such as 0.003: layers are left in "
            "floating point until it costs no more.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which images are drawn.")] = 0,
    resize: flags.Resize = None,
    crop: flags.Crop = None,
    mean: flags.Mean = None,
    std: flags.Std = None,
    exif: flags.Exif = None,
    max_pixels: flags.MaxPixels = None,
    *,
    request: Request,
    as_json: flags.Json = False,
) -> None:
    """Calibrate a model for int8.

    The network is run on images like those in use, and every tensor's range is noted; the table
    then goes to fastres compile --calibration.
    """
    import fastres
    from fastres.graph.ir import Graph

    model, rest = split(positionals or (), request.weights)
    if len(rest) != 1:
        raise InputError(f"give the calibration data after the model: one path, got {rest}")
    if max_drop is not None and val is None:
        raise InputError("--max-drop needs --val: labelled images, a folder for each class")
    request = replace(request.about(model), image_size=request.image_size or crop)
    target = open_model(request)
    warn_if_untrained(target)
    is_array = rest[0].endswith(".npy")
    preprocess = None
    if not is_array or val is not None:
        start = preprocess_for(target.shape)
        preprocess = adjusted(
            start, resize=resize, crop=crop, mean=mean, std=std, exif=exif, max_pixels=max_pixels
        )
    labelled = None if val is None else _labelled(val)
    table = fastres.quantize(
        target.model,  # type: ignore[arg-type]  # open_model gives no engine
        _array(Path(rest[0])) if is_array else rest[0],
        algorithm=algorithm,  # type: ignore[arg-type]  # quantize says which there are
        num_samples=samples,
        ignored=ignore.split(",") if ignore else (),
        validate=None
        if labelled is None or preprocess is None
        else lambda engine: _top1(engine, labelled, preprocess, target),
        max_drop=max_drop,
        seed=seed,
        inputs=None if isinstance(target.model, Graph) else image_input(target.shape, (1,)),
        preprocess=preprocess,
        backend=(request.backend or "auto").split(","),
    )
    if output is not None:
        try:
            table.save(output)
        except ValueError as error:
            raise InputError(str(error)) from error
    else:
        note("the table is not kept: give -o FILE")
    for text in table.notes:
        note(text)
    facts = _facts(table, target.name, output)
    emit("calibrate", _text(facts), facts, as_json=as_json)


def _array(file: Path) -> np.ndarray[Any, Any]:
    import numpy as np

    try:
        with open_regular(file):  # neither a pipe nor a device, for which NumPy would wait
            found = np.load(file, allow_pickle=False, mmap_mode="r")  # of what there is alone
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file} cannot be read as an array: {error}") from error
    if not isinstance(found, np.ndarray):
        raise InputError(f"{file} holds {type(found).__name__}; expected one array, [N, C, H, W]")
    return np.array(found)


def _labelled(folder: Path) -> list[tuple[Path, int]]:
    """Images with the number of their class: that of their folder in the order of names."""
    from fastres.calib.images import find_images

    classes = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if len(classes) < 2:
        raise InputError(
            f"--val {folder}: expected a folder with a folder of images for each class"
        )
    try:
        return [(image, i) for i, path in enumerate(classes) for image in find_images(path)]
    except ValueError as error:
        raise InputError(f"--val {folder}: {error}") from error


def _top1(
    engine: Engine, labelled: list[tuple[Path, int]], preprocess: Preprocess, target: Target
) -> float:
    """Share of images whose most probable class is theirs."""
    outputs = engine.graph.spec(engine.graph.outputs[0]).shape[-1]
    classes = labelled[-1][1] + 1
    if outputs != classes:
        raise InputError(
            f"--val has {classes} classes, {target.name} gives {outputs}: give a folder for each, "
            "in the order of the network's outputs"
        )
    engine.preprocess = preprocess
    found = engine.predict([image for image, _ in labelled], batch_size=8, top_k=1)
    right = [p.classes[0] == label for p, (_, label) in zip(found, labelled, strict=True)]
    return sum(right) / len(right)


def _facts(table: CalibrationTable, name: str, saved: Path | None) -> dict[str, Any]:
    return {
        "model": name,
        "algorithm": table.algorithm,
        "samples": table.samples,
        "tensors": len(table.tensors),
        "kept": list(table.keep),
        "curve": [
            {"algorithm": p.algorithm, "kept": list(p.kept), "accuracy": p.accuracy}
            for p in table.curve
        ],
        "sensitivity": table.sensitivity,
        "backend": table.backend,
        "notes": list(table.notes),
        "saved": None if saved is None else str(saved),
    }


def _text(facts: dict[str, Any]) -> str:
    from rich.table import Table

    from fastres.text import render

    table = Table(show_header=False, title=facts["model"])
    table.add_row("algorithm", facts["algorithm"])
    table.add_row("images", str(facts["samples"]))
    table.add_row("tensors", str(facts["tensors"]))
    table.add_row("left in floating point", ", ".join(facts["kept"]) or "nothing")
    table.add_row("saved", facts["saved"] or "no")
    parts = [render(table)]
    if facts["curve"]:
        parts.insert(0, render(_curve(facts)))
    return "\n".join(parts)


def _curve(facts: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"top-1 accuracy on {facts['backend']}")
    table.add_column("thresholds")
    table.add_column("layers left in floating point", overflow="fold")
    table.add_column("top-1", justify="right")
    for point in facts["curve"]:
        kept = point["kept"]
        some = ", ".join(kept[:4]) + (f" and {len(kept) - 4} more" if len(kept) > 4 else "")
        all_of_it = not point["algorithm"]
        table.add_row(
            "not quantised" if all_of_it else point["algorithm"],
            "all" if all_of_it else some or "none",
            f"{point['accuracy']:.2%}",
        )
    return table
