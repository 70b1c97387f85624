"""fastres bench: throughput and latency, ours and our peers', timed interleaved in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastres.cli import flags, pictures
from fastres.cli.flags import Request
from fastres.cli.output import emit, note, progress, working
from fastres.cli.targets import (
    Target,
    is_saved,
    open_target,
    precision_ran,
    split,
    to_engine,
)
from fastres.errors import InputError, ParityError

if TYPE_CHECKING:
    import torch

    from fastres.benchmarking import Target as Timed


@flags.takes_request()
def bench(
    positionals: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help=f"{flags.NAMES}, or the path of a saved engine; several are timed interleaved. "
            "May be left out where --weights is given.",
            show_default=False,
        ),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Timed beside ours: eager, eager_channels_last, torch_compile, openvino, "
            "onnxruntime.",
        ),
    ] = None,
    duration: Annotated[
        float, typer.Option(min=0.01, help="Seconds for each target and batch size.")
    ] = 3.0,
    percentile: Annotated[
        str, typer.Option(metavar="P,P", help="Latency percentiles.")
    ] = "50,90,95,99",
    *,
    request: Request,
    as_json: flags.Json = False,
    output: flags.Output = None,
) -> None:
    """Time models, and peers beside them.

    Targets take turns in one run; each is shown with the precision it really ran in.
    """
    from fastres.benchmarking import benchmark

    asked = request.about(None)
    chosen, percentiles = _peers(peers), _percentiles(percentile)
    targets = _open(positionals or (), asked)
    examples = {n: pictures.synthetic(n, targets[0]) for n in asked.batch_sizes}
    precisions = request.precision.split(",") if request.precision else [None]
    lanes: list[Lane] = []
    for target, name in zip(targets, _short_names(targets), strict=True):
        for one in precisions:
            tag = f"{name} " * (len(targets) > 1) + f"{one} " * (len(precisions) > 1)
            lanes.append(_lane(tag, target, _in(asked, one), chosen, examples))
    left_out = {name: why for lane in lanes for name, why in lane.left_out.items()}
    for name, why in left_out.items():
        note(f"{name} is left out: {why}")
    baseline = next((t.name for lane in lanes for t in lane.peers), None)
    with progress("timing") as advance:
        report = benchmark(
            [timed for lane in lanes for timed in (lane.ours, *lane.peers)],
            {n: batch.to(lanes[0].device) for n, batch in examples.items()},
            duration_s=duration,
            percentiles=percentiles,
            baseline=baseline,
            progress=advance,
        )
    names = [target.name for target in targets]
    fields = {"models": names, "left_out": left_out, **report.to_dict()}
    emit("bench", f"{', '.join(names)}\n{report}", fields, as_json=as_json, output=output)


@dataclass(frozen=True)
class Lane:
    """One of our engines with the peers that run the same model in the same precision."""

    ours: Timed
    peers: list[Timed]
    left_out: dict[str, str]
    device: torch.device


def _open(positionals: Sequence[str], request: Request) -> list[Target]:
    """All targets; they must take the same images, since they are fed the same ones.

    --trust-engine is for the saved engines among them.
    """
    first, rest = split(positionals, request.weights)
    if request.weights is not None and rest:
        raise InputError(f"--weights goes with one model, got also {', '.join(rest)}")
    names = list(dict.fromkeys([first, *rest]))
    saved = [name for name in names if name is not None and is_saved(name)]
    targets = []
    for name in names:
        trust = request.trust_engine if name in saved or not saved else None
        targets.append(open_target(replace(request, model=name, trust_engine=trust)))
    kinds = {(target.shape, target.dtype): target for target in targets}
    if len(kinds) > 1:
        takes = "; ".join(f"{t.name} takes {t.dtype} {list(t.shape)}" for t in kinds.values())
        raise InputError(f"models timed in one run must take the same images: {takes}")
    return targets


def _in(request: Request, precision: str | None) -> Request:
    """The request in one of its precisions; a calibration is for int8."""
    from fastres.options import EIGHT_BITS

    table = request.calibration if precision in (None, *EIGHT_BITS) else None
    return replace(request, precision=precision, calibration=table)


def _short_names(targets: Sequence[Target]) -> list[str]:
    """Engines by their file's name, which a table has room for, unless two share one."""
    full = [target.name for target in targets]
    short = [Path(name).name if Path(name).exists() else name for name in full]
    return short if len(set(short)) == len(short) else full


def _lane(
    tag: str,
    target: Target,
    request: Request,
    names: Sequence[str],
    examples: Mapping[int, torch.Tensor],
) -> Lane:
    """Compiles the target and prepares its peers; every result is checked before it is timed.

    Raises:
        ParityError: ours is wrong, so that its speed means nothing.
    """
    from torch import nn

    from fastres.benchmarking import Target as Timed
    from fastres.options import EIGHT_BITS
    from fastres.peers import contenders

    engine = to_engine(target, request)
    ours = Timed(f"{tag}fastres {engine.info.backend}", engine, precision_ran(engine))
    if not isinstance(target.model, nn.Module):
        if names:
            raise InputError(f"peers need the model's code, which {target.name} does not have")
        note(f"{target.name} is timed without a check: only a model can be checked against")
        return Lane(ours, [], {}, engine.device)
    with working(f"preparing and checking {target.name}"):
        found, refused = contenders(
            names,
            target.model,
            {n: batch.to(engine.device) for n, batch in examples.items()},
            ours=[ours],
            precision=engine.options.precision or "fp32",
            threads=request.threads,
            quantised=engine.graph if engine.options.precision in EIGHT_BITS else None,
        )
    if ours.name in refused:
        raise ParityError(refused[ours.name])
    peers = [replace(peer, name=tag + peer.name) for peer in found if peer is not ours]
    return Lane(ours, peers, {tag + n: why for n, why in refused.items()}, engine.device)


def _peers(text: str | None) -> list[str]:
    from fastres.peers import PEERS

    names = [part.strip() for part in text.split(",")] if text else []
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise InputError(f"there is no peer {', '.join(unknown)}; there are {', '.join(PEERS)}")
    return list(dict.fromkeys(names))


def _percentiles(text: str) -> tuple[float, ...]:
    found = flags.numbers("--percentile", text, text.count(",") + 1)
    if not all(0 < p <= 100 for p in found):
        raise InputError(f"--percentile {text!r}: each must be above 0 and at most 100")
    return found
