"""fastres bench: throughput and latency, ours and our peers', timed interleaved in one run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from fastres.cli import flags
from fastres.cli.flags import Request
from fastres.cli.output import check_folder, emit, note, one_interrupt
from fastres.errors import InputError

DEFAULT = "default"


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
        str,
        typer.Option(
            metavar="NAMES",
            help="Timed beside ours: eager, eager_channels_last, torch_compile, "
            "torch_compile_reduce_overhead, torch_compile_max_autotune, openvino, nncf, "
            "onnxruntime, torch_tensorrt, tensorrt; all; or none. default: eager, torch_compile, "
            "openvino and onnxruntime on a CPU, PyTorch's own on a GPU.",
        ),
    ] = DEFAULT,
    duration: Annotated[
        float, typer.Option(min=0.01, help="Seconds for each target and batch size.")
    ] = 3.0,
    percentile: Annotated[
        str, typer.Option(metavar="P,P", help="Latency percentiles.")
    ] = "50,90,95,99",
    transfers: Annotated[
        bool,
        typer.Option(
            "--transfers", help="Count bringing batches to the GPU and results back as well."
        ),
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also time ours layer by layer; --html does so, too.")
    ] = False,
    launches: Annotated[
        int,
        typer.Option(
            min=1, max=50, help="Times that every process is started; the duration is shared."
        ),
    ] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of turns.")] = 0,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="BASE.json",
            help="Judge ours against an earlier run's -o FILE, by the peers of both.",
        ),
    ] = None,
    fail_if_slower: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT",
            help="With --compare: exit status 1 if ours is slower by more than that: 5%.",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a report, one web page.")
    ] = None,
    *,
    request: Request,
    as_json: flags.Json = False,
    output: flags.Output = None,
) -> None:
    """Time models, and peers beside them.

    Every target runs in a process of its own on the same cores, started several times. All are
    checked against the model in float64 first; then they take turns. An interrupt keeps what was
    measured.
    """
    from fastres.cli.bench_run import Bench
    from fastres.report.plotting import check_charts
    from fastres.timing.guard import read_base

    check_folder(output, html)
    if not math.isfinite(duration):
        raise InputError(f"--duration is {duration}; give seconds")
    if html is not None:
        check_charts()
    asked = request.about(None)
    limit = _percent(fail_if_slower)
    if limit is not None and compare is None:
        raise InputError("--fail-if-slower says how much may be lost; --compare BASE.json, to what")
    base = None if compare is None else read_base(compare)
    bench = Bench(
        positionals or (),
        asked,
        peers=_peers(peers),
        duration_s=duration,
        percentiles=_percentiles(percentile),
        transfers=transfers,
        layers=layers or html is not None,
        launches=launches,
        seed=seed,
        base=None if base is None else (base, str(compare)),
    )
    with one_interrupt():
        results = bench.run()
        comparison, failure = None, results.failure
        if base is not None and results.finished:
            try:
                comparison = results.against(base, str(compare), 0.05 if limit is None else limit)
            except InputError as error:
                failure = error  # told after what was measured
        fields = results.to_dict(comparison)
        text = "\n".join([str(results), *([str(comparison)] if comparison else [])])
        emit("bench", text, fields, as_json=as_json, output=output)
        if html is not None:
            from fastres.report import write_report

            write_report(html, [{"command": "bench", **fields}])
            note(f"the report is {html}")
    if failure is not None:
        raise failure
    if not results.finished:
        raise typer.Exit(130)
    if comparison is not None and comparison.slower and limit is not None:
        raise typer.Exit(1)


def _peers(text: str) -> list[str] | None:
    """Names of peers; None: those of the device."""
    from fastres.timing.peers import PEERS

    if text == DEFAULT:
        return None
    if text in ("all", "none"):
        return list(PEERS) if text == "all" else []
    names = [part.strip() for part in text.split(",")]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        known = ", ".join([*PEERS, "all", "none"])
        raise InputError(f"there is no peer {', '.join(unknown)}; there are {known}")
    return list(dict.fromkeys(names))


def _percentiles(text: str) -> tuple[float, ...]:
    found = flags.numbers("--percentile", text, text.count(",") + 1)
    if not all(0 < p <= 100 for p in found):
        raise InputError(f"--percentile {text!r}: each must be above 0 and at most 100")
    return found


def _percent(text: str | None) -> float | None:
    """ "5%" or "5" → 0.05."""
    if text is None:
        return None
    try:
        found = float(text.removesuffix("%"))
    except ValueError:
        found = math.nan
    if not 0 < found < 100:
        raise InputError(
            f"--fail-if-slower {text!r}: give a percentage above 0 and below 100, as in 5%"
        )
    return found / 100
