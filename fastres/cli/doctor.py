"""fastres doctor: what is installed, which backends can run here, and what to type if not."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import typer

from fastres.cli import flags
from fastres.cli.output import emit, working
from fastres.installed import Package, look_around
from fastres.text import empty_table, render


def doctor(as_json: flags.Json = False, output: flags.Output = None) -> None:
    """Show what is installed and which backends run here.

    For everything missing there is the line to type. Status 3 if something needed is missing.
    """
    with working("looking around"):
        found = look_around()
    fields: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": [asdict(package) for package in found.packages],
        "gpu": found.gpu,
        "backends": [asdict(backend) for backend in found.backends],
        "install": found.install,
    }
    text = found.text(_table(found.packages))
    emit("doctor", text, fields, as_json=as_json, output=output)
    if not found.suffices:
        raise typer.Exit(3)


def _table(packages: Sequence[Package]) -> str:
    table = empty_table("package", "version", "state", "for")
    for p in packages:
        table.add_row(p.name, p.version or "-", p.problem or "ok", p.purpose)
    return render(table)
