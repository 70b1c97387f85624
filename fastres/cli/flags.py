"""The flags that commands share, and what they add up to: a `Request`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import typer

from fastres.cli.output import check_outputs, only_reports
from fastres.errors import InputError

WRITTEN = ("output", "html", "trace")  # parameters of commands that name a file to write
NAMES = "fastres:NAME[@v1|@v1.5], torchvision:NAME, timm:NAME or package.module:factory"
_TARGET = f"{NAMES}, or the path of a saved engine"

ModelName = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=f"{NAMES}; may be left out where --weights is given."),
]
TargetName = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=f"{_TARGET}; may be left out where --weights is given."),
]
Backend = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="auto, cpu, triton, tensorrt, reference or onnxruntime; several are tried in order: "
        "triton,cpu. "
        "Without it: auto, which is triton with a GPU and cpu without.",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="fp32, tf32, fp16, bf16, int8 or fp8. Without it: that of the model's parameters, or "
        "int8 with --calibration."
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="For int8 and fp8: the table that fastres calibrate made."),
]
BatchSize = Annotated[
    str | None, typer.Option(metavar="N[,N...]", help="One batch size, or several: 1,8.")
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="PIXELS", help="Height and width. Without it: 224, or 32 for CIFAR nets."
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A state_dict or checkpoint of torch.save or safetensors: loaded strictly into MODEL, "
        "or built into a network by itself where MODEL is left out.",
    ),
]
Entry = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Where in the file of --weights they lie, if it holds several, such as raw and "
        "averaged ones: state_dict_ema.",
    ),
]
MaxBytes = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="What the tensors of --weights may take (without it: twice the file, or 32 MiB), or "
        "what a saved engine may hold in one run (64 MiB and 64 times the file).",
    ),
]
Version = Annotated[
    str | None,
    typer.Option(
        metavar="v1|v1.5",
        help="Where a bottleneck has its stride: v1 in the first 1x1, v1.5 in the 3x3. "
        "Weights alone do not show it.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Without it: the backend's.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads. Without it: every core allowed.")
]
OnUnsupported = Annotated[
    str | None,
    typer.Option(
        metavar="error|fallback",
        help="What to do with nodes that the backend refuses: stop, or run them in PyTorch.",
    ),
]
Architecture = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="sm_NN",
        help="Build for a GPU architecture that need not be here: sm_90 (triton; tensorrt for "
        "some).",
    ),
]
Tune = Annotated[
    bool | None,
    typer.Option(
        "--tune",
        help="Measure the kernels' tiles on this GPU first, which takes minutes once (triton).",
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where such measurements are kept. Without it: fastres in the user's cache folder.",
    ),
]
TrustEngine = Annotated[
    bool | None,
    typer.Option(
        "--trust-engine",
        help="Run the machine code in a saved engine, which can do anything that you can. "
        "Without it: its kernels are compiled on this machine.",
    ),
]
Resize = Annotated[
    int | None,
    typer.Option(min=1, help="Pixels of the shorter side. Without it: 256/224 of the crop."),
]
Crop = Annotated[
    int | None,
    typer.Option(min=1, help="Pixels of the central crop. Without it: the image size."),
]
Mean = Annotated[str | None, typer.Option(metavar="R,G,B", help="Without it: 0.485,0.456,0.406.")]
Std = Annotated[str | None, typer.Option(metavar="R,G,B", help="Without it: 0.229,0.224,0.225.")]
Exif = Annotated[
    bool | None,
    typer.Option(
        "--exif/--no-exif",
        help="Turn pictures as their EXIF orientation says, or take them as they are stored. "
        "Without it: as the engine was compiled to, else turned.",
        show_default=False,
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(min=1, help="Pixels of a picture, at most. Without it: 89478485."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write the JSON document there too."),
]

Command = Callable[..., None]


@dataclass(frozen=True)
class Request:
    """What the shared flags ask for, in the order of the help; None is what was left unsaid.

    `model` and `batch_sizes` are no flags; `about` sets them.
    """

    backend: Backend = None
    precision: Precision = None
    calibration: Calibration = None
    batch_size: BatchSize = None
    image_size: ImageSize = None
    weights: Weights = None
    entry: Entry = None
    max_bytes: MaxBytes = None
    version: Version = None
    device: Device = None
    threads: Threads = None
    on_unsupported: OnUnsupported = None
    target: Architecture = None
    tune: Tune = None
    cache_dir: CacheDir = None
    trust_engine: TrustEngine = None
    model: str | None = None
    batch_sizes: tuple[int, ...] = (1,)

    def about(self, model: str | None, default_batch: int = 1) -> Request:
        """The same for this model, with its batch sizes read.

        Raises:
            InputError: see `batch_sizes`.
        """
        return replace(
            self, model=model, batch_sizes=batch_sizes(self.batch_size, (default_batch,))
        )

    def only_for_models(self) -> list[str]:
        """The flags given that change how a model is compiled, so that no saved engine takes."""
        settings = ("backend", "precision", "calibration", "threads", "on_unsupported")
        names = ("weights", "entry", "version", *settings, "tune", "cache_dir")
        return [f"--{n.replace('_', '-')}" for n in names if getattr(self, n) is not None]


def takes_request(
    *, without: Collection[str] = (), target: bool = False
) -> Callable[[Command], Command]:
    """Gives a command the shared flags in place of its parameter `request`, made of them.

    Args:
        without: flags that it does not have.
        target: whether it has --target: it must not need the engine to run.
    """
    left_out = {*without, None if target else "target"}
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in get_type_hints(Request, include_extras=True).items()
        if get_origin(kind) is Annotated and name not in left_out
    ]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            asked = {flag.name: given.pop(flag.name) for flag in flags}
            _check_outputs({**asked, **given})
            with only_reports():
                command(request=Request(**asked), **given)

        signature = inspect.signature(command, eval_str=True)
        parameters = [
            parameter
            for own in signature.parameters.values()
            for parameter in (flags if own.name == "request" else [own])
        ]
        # where typer looks for a command's flags
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _check_outputs(given: Mapping[str, Any]) -> None:
    """Of everything on a command line that is written, and everything else that may be a file."""
    written = [path for name, path in given.items() if name in WRITTEN and path is not None]
    read = []
    for name, value in given.items():
        values = value if isinstance(value, list | tuple) else [value]
        read += [v for v in values if isinstance(v, str | Path)] if name not in WRITTEN else []
    check_outputs(written, read)


def batch_sizes(text: str | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """ "1,8" → (1, 8), each size once.

    Raises:
        InputError: something in the list is not an integer of at least 1.
    """
    if text is None:
        return default
    sizes = []
    for part in text.split(","):
        if not part.strip().isdecimal() or len(part) > 18 or int(part) < 1:
            raise InputError(
                f"--batch-size {text!r}: {part.strip()!r} is not an integer of at least 1 "
                "and at most 18 digits; give one size or several, as in 1,8"
            )
        sizes.append(int(part))
    return tuple(dict.fromkeys(sizes))


def numbers(flag: str, text: str, count: int) -> tuple[float, ...]:
    """ "0.5,0.5,0.5" → (0.5, 0.5, 0.5).

    Raises:
        InputError: not so many, or something that is no number.
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) != count:
        raise InputError(f"{flag} {text!r}: expected {count} numbers with commas between them")
    return found
