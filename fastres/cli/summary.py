"""fastres summary: shapes, parameters and multiply-adds, layer by layer."""

from __future__ import annotations

from fastres.cli import flags
from fastres.cli.flags import Request
from fastres.cli.output import emit, working
from fastres.cli.targets import image_input, open_target


def summary(
    model: flags.TargetName = None,
    image_size: flags.ImageSize = None,
    weights: flags.Weights = None,
    entry: flags.Entry = None,
    max_bytes: flags.MaxBytes = None,
    version: flags.Version = None,
    as_json: flags.Json = False,
    output: flags.Output = None,
) -> None:
    """Show layers: shapes, parameters, multiply-adds."""
    import fastres

    request = Request(
        model=model,
        image_size=image_size,
        weights=weights,
        entry=entry,
        max_bytes=max_bytes,
        version=version,
    )
    target = open_target(request)
    with working(f"counting {target.name}"):
        found = fastres.summary(target.model, image_input(target.shape, (1,)))
    fields = {"model": target.name, **found.to_dict()}
    emit("summary", str(found), fields, as_json=as_json, output=output)
