"""fastres report: documents of results as one page for a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastres.cli import flags
from fastres.cli.output import check_output, emit, make_folder, working


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULTS.json...",
            help="What fastres bench -o FILE or fastres profile -o FILE wrote, bench.cpu.scaling, "
            "bench.accuracy or bench.cpu.int8; together in one page.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")
    ] = Path("report.html"),
    folder: Annotated[
        Path | None,
        typer.Option(
            "--pictures",
            metavar="FOLDER",
            help="Also draw speed over peers and the roofline there, as SVG, light and dark.",
        ),
    ] = None,
    as_json: flags.Json = False,
) -> None:
    """Write charts and tables of results as one HTML file that needs nothing else.

    Needs matplotlib: pip install 'fastres[report]'.
    """
    from fastres.report.image import write_images
    from fastres.report.page import write_page
    from fastres.report.pictures import pictures
    from fastres.report.reading import read
    from fastres.report.writing import report as make

    check_output(output, *results)
    make_folder(folder)
    sources = [read(path) for path in dict.fromkeys(results)]
    with working("drawing"):
        page = make(sources)
        drawn = {} if folder is None else pictures([source.document for source in sources])
    write_page(output, page)
    written = [] if folder is None else write_images(folder, drawn)
    size = len(page.encode())
    fields = {
        "page": str(output),
        "bytes": size,
        "pictures": [str(path) for path in written],
        "results": [source.name for source in sources],
    }
    said = [f"{output}: {size / 1024:.0f} KiB", *map(str, written)]
    emit("report", "\n".join(said), fields, as_json=as_json)
