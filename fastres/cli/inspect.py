"""fastres inspect: what an engine is made of, node by node."""

from __future__ import annotations

from typing import Annotated

import typer

from fastres.cli import flags
from fastres.cli.flags import Request
from fastres.cli.output import emit
from fastres.cli.targets import open_target, precision_ran, to_engine


@flags.takes_request(without="batch_size", target=True)
def inspect_engine(
    model: flags.TargetName = None,
    graph: Annotated[
        bool, typer.Option("--graph", help="Print the optimised graph in full, with parameters.")
    ] = False,
    *,
    request: Request,
    as_json: flags.Json = False,
    output: flags.Output = None,
) -> None:
    """Show what an engine is made of.

    For each node: operation, what was fused into it, backend, precision, and why it fell back.
    """
    request = request.about(model)
    target = open_target(request)
    engine = to_engine(target, request)
    info = engine.info
    fields = {"model": target.name, "precision_ran": precision_ran(engine), **info.to_dict()}
    dump = str(engine.graph)
    if graph:
        fields["graph"] = dump.splitlines()
    emit("inspect", dump if graph else str(info), fields, as_json=as_json, output=output)
