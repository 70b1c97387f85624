"""fastres compile: a model into an engine, told about and saved."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastres.cli import flags
from fastres.cli.flags import Request
from fastres.cli.output import emit, working
from fastres.cli.targets import open_model, precision_ran, to_engine, warn_if_untrained

if TYPE_CHECKING:
    from rich.table import Table

    from fastres.engine.engine import Engine


@flags.takes_request(without=("trust_engine",), target=True)
def compile_model(
    model: flags.ModelName = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="Save the engine there: one file if it ends in .fastres, else a folder.",
        ),
    ] = None,
    *,
    request: Request,
    as_json: flags.Json = False,
) -> None:
    """Compile a model into an engine and save it.

    Any batch size runs in the engine; it is prepared for the first of --batch-size. With --target
    every kernel is compiled for a GPU that is not here, and listed with what it uses. With --tune
    the kernels' tiles are measured first; an interrupted run goes on where it was.
    """
    from fastres.artifact.container import check_replaceable, place

    if output is not None:
        check_replaceable(place(output))
    request = request.about(model)
    target = open_model(request)
    started = time.perf_counter()
    engine = to_engine(target, request)
    seconds = time.perf_counter() - started
    if output is not None:
        with working(f"saving {output}"):
            engine.save(output)
    warn_if_untrained(target)
    facts = _facts(engine, target.name, seconds, output)
    from fastres.engine.info import kernel_table
    from fastres.text import render

    text = render(_table(facts))
    if kernels := engine.info.account.kernels:
        text = f"{render(kernel_table(kernels))}\n{text}"
    emit("compile", text, facts, as_json=as_json)


def _facts(engine: Engine, name: str, seconds: float, saved: Path | None) -> dict[str, Any]:
    info = engine.info
    return {
        "model": name,
        "backend": info.backend,
        "precision": info.precision,
        "precision_ran": precision_ran(engine),
        "nodes": len(info.nodes),
        "operations": dict(Counter(node.op for node in info.nodes).most_common()),
        "captured_nodes": len(engine.source.nodes),
        "input": str(engine.graph.inputs[0].spec),
        "outputs": [str(engine.graph.spec(o)) for o in engine.graph.outputs],
        "not_quantised": [f"{node.name}: {node.precision}" for node in info.not_quantised],
        "notes": list(info.account.notes),
        "fallbacks": [f"{node.name}: {node.reason}" for node in info.fallbacks],
        "passed_over": list(info.passed_over),
        "target": engine.options.target,
        "kernels": info.to_dict()["kernels"],
        "choices": info.to_dict()["choices"],
        "compile_seconds": round(seconds, 3),
        "saved": None if saved is None else str(saved),
    }


def _table(facts: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(show_header=False, title=facts["model"])
    operations = ", ".join(f"{count} {op}" for op, count in facts["operations"].items())
    table.add_row("backend", facts["backend"])
    table.add_row("precision", f"{facts['precision']} asked for, {facts['precision_ran']} run")
    table.add_row("nodes", f"{facts['nodes']} from {facts['captured_nodes']}: {operations}")
    table.add_row("input", facts["input"])
    table.add_row("output", ", ".join(facts["outputs"]))
    for key in ("not_quantised", "notes", "fallbacks", "passed_over"):
        if facts[key]:
            table.add_row(key.replace("_", " "), "\n".join(facts[key]))
    table.add_row("compiled in", f"{facts['compile_seconds']:.2f} s")
    table.add_row("saved", facts["saved"] or "no: give -o PATH")
    return table
