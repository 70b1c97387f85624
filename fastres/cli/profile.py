"""fastres profile: where the time goes, node by node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastres.cli import flags, pictures
from fastres.cli.flags import Request
from fastres.cli.output import check_folder, emit, make_folder, working
from fastres.cli.targets import open_target, precision_ran, to_engine
from fastres.errors import InputError


@flags.takes_request()
def profile(
    model: flags.TargetName = None,
    *,
    request: Request,
    as_json: flags.Json = False,
    output: flags.Output = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a Chrome trace there, by torch.profiler."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw the network there, as a page for a browser."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--pictures",
            metavar="FOLDER",
            help="Also draw the network there in one picture, as SVG, light and dark.",
        ),
    ] = None,
) -> None:
    """Show the time, GFLOP/s and GB/s of every node in one run; on a GPU, share of the roofline."""
    check_folder(output, trace, html)
    make_folder(folder)
    request = request.about(model)
    size, *more = request.batch_sizes
    if more:
        sizes = ", ".join(map(str, request.batch_sizes))
        raise InputError(f"profile takes one batch size, got {sizes}")
    target = open_target(request)
    engine = to_engine(target, request)
    batch = pictures.synthetic(size, target).to(engine.device)
    with working(f"profiling {target.name}"):
        found = engine.profile(batch, trace=trace)
    if html is not None:
        from fastres.report.network import network_page
        from fastres.report.page import write_page

        write_page(html, network_page(target.name, engine, [batch], found))
    if folder is not None:
        from fastres.report.image import write_images
        from fastres.report.network import network_picture

        write_images(folder, {"network": network_picture(target.name, engine, [batch], found)})
    ran = precision_ran(engine)
    head = f"{target.name} on {engine.info.backend} in {ran}, batch {size}"
    fields = {
        "model": target.name,
        "backend": engine.info.backend,
        "precision_ran": ran,
        "batch_size": size,
        **found.to_dict(),
    }
    emit("profile", f"{head}\n{found}", fields, as_json=as_json, output=output)
