"""Where the figures come from: the machines, their software, and the commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import PurePath

from fastres.report.documents import Document, Machine, Run
from fastres.report.html import Column, Html, join, table, tag
from fastres.report.numbers import short


def machine_table(measured: Mapping[str, Machine]) -> Html:
    """A column for each distinct machine, under the names of what was measured there."""
    machines: list[Machine] = []
    names: list[list[str]] = []
    for name, machine in measured.items():
        if machine not in machines:
            machines.append(machine)
            names.append([])
        names[machines.index(machine)].append(name)
    found = [_facts(machine) for machine in machines]
    rows = [
        [fact, *(facts.get(fact, "") for facts in found)]
        for fact in dict.fromkeys(fact for facts in found for fact in facts)
    ]
    columns = [Column("what"), *(Column(", ".join(made)) for made in names)]
    return table("Where the figures were measured", columns, rows)


def commands(documents: Mapping[str, Document]) -> Html:
    """What to type to measure the same again."""
    return join(
        join([tag("h3", name), _command(document.run), tag("p", _circumstances(document.run))])
        for name, document in documents.items()
    )


def _facts(machine: Machine) -> dict[str, str]:
    facts = {
        "processor": machine.cpu,
        "cores": str(machine.cores or ""),
        "threads": str(machine.threads or ""),
        "GPU": machine.gpu or "none",
        **machine.versions,
        **machine.state,
    }
    return {fact: found for fact, found in facts.items() if found}


def _command(run: Run) -> Html:
    if not run.argv:
        return tag("p", "The document does not say by which command it was made.")
    program, *arguments = run.argv
    return tag("pre", tag("code", shlex.join([PurePath(program).name, *arguments])))


def _circumstances(run: Run) -> str:
    facts = {
        "on": run.date,
        "commit": run.commit,
        "seed": None if run.seed is None else str(run.seed),
        "took": None if run.seconds is None else short(run.seconds, "s"),
        "each target timed for": None if run.duration_s is None else short(run.duration_s, "s"),
        "transfers": run.transfers,
    }
    return "; ".join(f"{what} {found}" for what, found in facts.items() if found)
