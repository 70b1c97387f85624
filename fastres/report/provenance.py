"""Where the figures come from: the machines, their software, and the commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import PurePath

from msgspec.structs import replace

from fastres.report.documents import Bench, Document
from fastres.report.html import Column, Html, items, join, table, tag
from fastres.report.numbers import short
from fastres.report.records import Machine, Run


def machine_table(measured: Mapping[str, Machine]) -> Html:
    """A column for each distinct machine, under the names of what was measured there.

    What differs from hour to hour, such as load and clocks, makes no other machine of it; where it
    differs it is listed below.
    """
    machines: list[Machine] = []
    names: list[list[str]] = []
    for name, machine in measured.items():
        lasting = replace(machine, state={})
        if lasting not in machines:
            machines.append(lasting)
            names.append([])
        names[machines.index(lasting)].append(name)
    found = []
    apart: list[str] = []
    for lasting, made in zip(machines, names, strict=True):
        states = [measured[name].state for name in made]
        alike = all(state == states[0] for state in states)
        found.append(_facts(replace(lasting, state=states[0]) if alike else lasting))
        if not alike:
            apart += [f"{name}: {_state(measured[name])}" for name in made]
    rows = [
        [fact, *(facts.get(fact, "") for facts in found)]
        for fact in dict.fromkeys(fact for facts in found for fact in facts)
    ]
    columns = [Column("what"), *(Column(", ".join(made)) for made in names)]
    return join(
        [
            table("Where the figures were measured", columns, rows),
            join([tag("p", "The machine at the time:"), items(apart)]) if apart else Html(""),
        ]
    )


def commands(documents: Mapping[str, Document]) -> Html:
    """What to type to measure the same again."""
    return join(
        join([tag("h3", name), _command(document.run), tag("p", _circumstances(document))])
        for name, document in documents.items()
    )


def _state(machine: Machine) -> str:
    return ", ".join(f"{what} {found}" for what, found in machine.state.items()) or "not recorded"


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


def _circumstances(document: Document) -> str:
    run = document.run
    seed = document.seed if isinstance(document, Bench) else run.seed
    facts = {
        "on": run.date,
        "commit": run.commit,
        "seed": None if seed is None else str(seed),
        "launches": None if run.launches is None else str(run.launches),
        "took": None if run.seconds is None else short(run.seconds, "s"),
        "each target timed for": None if run.duration_s is None else short(run.duration_s, "s"),
        "transfers": run.transfers,
    }
    return "; ".join(f"{what} {found}" for what, found in facts.items() if found)
