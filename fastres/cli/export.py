"""fastres export: a model into a file for other runtimes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from fastres.cli import flags
from fastres.cli.flags import Request
from fastres.cli.output import emit, working
from fastres.cli.targets import image_input, open_model, warn_if_untrained
from fastres.errors import InputError

_UNUSED = ("backend", "precision", "device", "threads", "on_unsupported", "batch_size")


@flags.takes_request(without=(*_UNUSED, "tune", "cache_dir", "trust_engine"))
def export(
    model: flags.ModelName = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The file to write."),
    ] = None,
    to: Annotated[str, typer.Option(metavar="onnx", help="The form.")] = "onnx",
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, fp16 or int8. Without it: fp32, or int8 with --calibration."),
    ] = None,
    placement: Annotated[
        str,
        typer.Option(
            metavar="tensorrt|openvino",
            help="In int8: for which runtime residual additions are rounded.",
        ),
    ] = "tensorrt",
    *,
    request: Request,
    as_json: flags.Json = False,
) -> None:
    """Write a model as ONNX, for trtexec and other runtimes.

    BatchNorms are folded; the batch size is free. In int8, QuantizeLinear and DequantizeLinear
    stand where values are rounded.
    """
    import fastres
    from fastres.graph.ir import Graph

    if to != "onnx":
        raise InputError(f"--to {to!r}: there is onnx")
    if output is None:
        raise InputError("give -o FILE, the file to write")
    request = request.about(model)
    target = open_model(request)
    with working(f"writing {output}"):
        graph = fastres.export(
            target.model,  # type: ignore[arg-type]  # open_model gives no engine
            output,
            inputs=None if isinstance(target.model, Graph) else image_input(target.shape, (1,)),
            precision=precision,  # type: ignore[arg-type]  # export says which there are
            calibration=request.calibration,
            placement=placement,  # type: ignore[arg-type]  # so here
        )
    warn_if_untrained(target)
    facts = _facts(graph, output)
    emit("export", _text(facts), facts, as_json=as_json)


def _facts(graph: Any, output: Path) -> dict[str, Any]:
    from fastres.graph.ir import op_name

    return {
        "file": str(output),
        "bytes": output.stat().st_size,
        "inputs": [f"{value.name}: {value.spec}" for value in graph.inputs],
        "outputs": [f"{name}: {graph.spec(name)}" for name in graph.outputs],
        "operations": dict(Counter(op_name(node.op) for node in graph.nodes).most_common()),
        "int8_layers": sum("scale" in node.params for node in graph.nodes),
    }


def _text(facts: dict[str, Any]) -> str:
    operations = ", ".join(f"{count} {op}" for op, count in facts["operations"].items())
    lines = [
        f"{facts['file']}: {facts['bytes'] / 1e6:.1f} MB",
        f"inputs {', '.join(facts['inputs'])}",
        f"outputs {', '.join(facts['outputs'])}",
        operations,
    ]
    if facts["int8_layers"]:
        lines.append(f"{facts['int8_layers']} layers in int8")
    return "\n".join(lines)
