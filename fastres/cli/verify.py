"""fastres verify: an engine's numbers against its model's, whole, layer by layer, or bisected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastres.cli import flags, pictures
from fastres.cli.flags import Request
from fastres.cli.output import emit, note, working
from fastres.cli.targets import Target, open_model, open_target, split, to_engine
from fastres.cli.verify_across import across, status_of, table_of
from fastres.errors import InputError

if TYPE_CHECKING:
    import torch


@flags.takes_request()
def verify(
    positionals: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL [ENGINE]",
            help=f"The reference: {flags.NAMES}; may be left out where --weights is given. "
            "Then the path of a saved engine; without it the model is compiled on the spot.",
            show_default=False,
        ),
    ] = None,
    layerwise: Annotated[
        bool, typer.Option("--layerwise", help="Compare every layer; names the first one past.")
    ] = False,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="On failure, find the first node that goes wrong.")
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Images, or a folder. Without it: made in code."),
    ] = None,
    atol: Annotated[
        float | None, typer.Option(min=0, help="Absolute tolerance in place of the policy.")
    ] = None,
    rtol: Annotated[
        float | None, typer.Option(min=0, help="Relative tolerance in place of the policy.")
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Check an engine of each: cpu,triton,tensorrt,onnxruntime; what cannot run here "
            "is listed with the reason.",
        ),
    ] = None,
    *,
    request: Request,
    as_json: flags.Json = False,
    output: flags.Output = None,
) -> None:
    """Check an engine against its model; status 1 if it fails.

    The bounds are twice the error of PyTorch itself in the engine's precision, both measured
    against float64. Several batch sizes are all checked.
    """
    import torch

    import fastres

    model, rest = split(positionals or (), request.weights)
    if len(rest) > 1:
        raise InputError(f"one engine at a time, got {', '.join(rest)}")
    request = request.about(model, default_batch=4)
    engine_path = rest[0] if rest else None
    _check_flags(request, engine_path)
    if backends is not None and (engine_path or request.backend):
        raise InputError("--backends compiles the model for each: leave out ENGINE and --backend")
    # only the engine beside the model can be trusted, or not
    target = open_model(replace(request, trust_engine=None) if engine_path else request)
    candidate = _candidate(engine_path, request) or target
    fed = candidate if candidate.normalises else target
    data = _data(fed, images, max(request.batch_sizes))
    origin = _weights(target, data, request.weights, engine_path)
    batches = [part for size in request.batch_sizes for part in torch.split(data, size)]
    how: dict[str, Any] = {"layerwise": layerwise, "bisect": bisect, "atol": atol, "rtol": rtol}
    fields: dict[str, Any] = {"model": target.name, "engine": engine_path, "weights": origin}
    if backends is not None:
        found = across(target, request, backends.split(","), batches, how)
        facts = {**fields, "backends": [outcome.to_dict() for outcome in found]}
        emit("verify", table_of(found, target.name), facts, as_json=as_json, output=output)
        raise typer.Exit(status_of(found))
    engine = to_engine(candidate, request)
    with working(f"verifying {target.name}"):
        report = fastres.verify(target.model, engine, batches, **how)
    emit("verify", str(report), {**fields, **report.to_dict()}, as_json=as_json, output=output)
    if not report.passed:
        raise typer.Exit(1)


def _check_flags(request: Request, engine: str | None) -> None:
    if engine is None:
        return
    wrong = [f for f in request.only_for_models() if f not in ("--weights", "--entry", "--version")]
    if wrong:
        raise InputError(
            f"{engine} is compiled already: {', '.join(wrong)} cannot be given with it"
        )


def _data(target: Target, images: Path | None, count: int) -> torch.Tensor:
    if images is not None:
        return pictures.read(images, target)
    return pictures.synthetic(count, target)


def _weights(target: Target, data: torch.Tensor, weights: Path | None, engine: str | None) -> str:
    """Gives an untrained network statistics that matter, and says what weights were compared."""
    if not target.untrained:
        return "as in the model" if weights is None else str(weights)
    if engine is not None:
        note(
            "untrained weights: BatchNorms without an effect are hard to check; compile and verify "
            "with --weights"
        )
        return "untrained"
    pictures.settle(target, data)
    note("untrained weights, given BatchNorm statistics that matter (fastres.models.settle)")
    return "untrained, settled"


def _candidate(path: str | None, request: Request) -> Target | None:
    if path is None:
        return None
    return open_target(
        Request(model=path, device=request.device, trust_engine=request.trust_engine)
    )
