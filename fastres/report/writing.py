"""The report: a page of everything that some documents of results hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastres.report.accuracy import accuracy_parts, parity_tables, sqnr_charts
from fastres.report.documents import Accuracy, Bench, Document, GuardTrials, Parities, Scaling
from fastres.report.findings import findings
from fastres.report.guard import guard_parts
from fastres.report.html import Html, join, tag
from fastres.report.layers import layer_tables, roofline_charts
from fastres.report.page import page, write_page
from fastres.report.provenance import commands, machine_table
from fastres.report.reading import Source, from_memory
from fastres.report.scaling import scaling_charts
from fastres.report.speed import (
    change_tables,
    latency_charts,
    measurement_tables,
    peer_charts,
    ratio_charts,
)
from fastres.report.versions import version_tables

_ORDER = (Bench, Scaling, Accuracy, Parities, GuardTrials)
_LEADS = {
    "Speed over peers": "How many times as fast fastres is as each peer that ran the same model in "
    "the same precision; dashed: equal speed. Shown is the {observed}, and its 95 % interval.",
    "Speed over the baseline": "How many times as fast as the baseline, the dashed line: the "
    "{observed}, and its 95 % interval.",
    "Latency": "Of single calls. Thick: the middle half, with a gap at the median; thin: from the "
    "5th to the 95th percentile; mark: the 99th; last stroke: the longest.",
    "v1 against v1.5": "A bottleneck strides in its first 1×1 convolution (v1) or in its 3×3 "
    "(v1.5). Speed is the {observed}, and its 95 % interval.",
    "Scaling": "Medians with their 95 % intervals; dashed: the straight line that fits best.",
    "Regression guard": "How often the guard is right, asked by real runs: each trial times a "
    "network, the same once more, and a slower one under its name. Shown are the speeds of the "
    "second and third run over the first with their 95 % intervals; dashed: equal speed, and the "
    "limit given to the guard.",
    "Roofline": "What each layer reaches, over the work it has for each byte that it moves; both "
    "axes are logarithmic. Lines: the most that the machine's rates allow, where they are known.",
}


def write_report(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Writes a page about documents that were just made.

    Args:
        results: as `fastres bench -o` writes them.

    Raises:
        InputError: one is of a kind that is not known, or the file cannot be written.
        BackendUnavailable: matplotlib is not installed.
    """
    only = len(results) == 1
    names = ("this run" if only else f"run {i + 1}" for i in range(len(results)))
    sources = [from_memory(*pair) for pair in zip(results, names, strict=True)]
    write_page(path, report(sources))


def report(sources: Sequence[Source]) -> Html:
    """The page, with a section for everything there is something to say of.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    sources = sorted(sources, key=lambda source: _ORDER.index(type(source.document)))
    named = dict(zip(_short_names(sources), (s.document for s in sources), strict=True))
    benches = {name: d for name, d in named.items() if isinstance(d, Bench)}
    scalings = {name: d for name, d in named.items() if isinstance(d, Scaling)}
    trials = {name: d for name, d in named.items() if isinstance(d, Accuracy)}
    parities = {name: d for name, d in named.items() if isinstance(d, Parities)}
    guards = {name: d for name, d in named.items() if isinstance(d, GuardTrials)}
    parts = [
        ("Summary", findings(named)),
        ("Speed over peers", peer_charts(benches)),
        ("Speed over the baseline", ratio_charts(benches)),
        ("Measurements", measurement_tables(benches)),
        ("Change since an earlier run", change_tables(benches)),
        ("Latency", latency_charts(benches)),
        ("v1 against v1.5", version_tables(benches)),
        ("Scaling", scaling_charts(scalings)),
        ("Roofline", roofline_charts(benches)),
        ("Layers", layer_tables(benches)),
        ("INT8 accuracy", join([accuracy_parts(trials), sqnr_charts(parities, benches)])),
        ("Parity", parity_tables(benches, parities)),
        ("Regression guard", guard_parts(guards)),
        ("Machine and versions", machine_table({name: d.machine for name, d in named.items()})),
        ("How to reproduce", commands(named)),
    ]
    observed = _observed(benches.values())
    led = [(title, join([_lead(title, observed), part])) for title, part in parts if part]
    return page("fastres: results", _subtitle(named), led)


def _lead(title: str, observed: str) -> Html:
    lead = _LEADS.get(title)
    return tag("p", lead.format(observed=observed), class_="lead") if lead else Html("")


def _observed(benches: Iterable[Bench]) -> str:
    """What ratios are, by how often the processes of the runs were started."""
    several = {(bench.run.launches or 1) > 1 for bench in benches}
    once = "median over rounds in which both took turns"
    if True not in several:
        return once
    found = "mean over launches of the medians over paired rounds"
    return f"{found} (of a single launch: the {once})" if False in several else found


def _subtitle(named: Mapping[str, Document]) -> str:
    machines = dict.fromkeys(d.machine.gpu or d.machine.cpu for d in named.values())
    dates = sorted({d.run.date[:10] for d in named.values()} - {""})
    return "; ".join(
        filter(None, (", ".join(named), *machines, " to ".join(dates[:1] + dates[1:][-1:])))
    )


def _short_names(sources: Sequence[Source]) -> list[str]:
    """Files by their name without the folder, unless two share one."""
    names = [Path(source.name).name for source in sources]
    return names if len(set(names)) == len(names) else [source.name for source in sources]
