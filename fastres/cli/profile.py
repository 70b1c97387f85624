"""fastres profile: where the time goes, node by node."""

from __future__ import annotations

from fastres.cli import flags, pictures
from fastres.cli.flags import Request
from fastres.cli.output import emit, working
from fastres.cli.targets import open_target, precision_ran, to_engine
from fastres.errors import InputError


def profile(
    model: flags.TargetName = None,
    backend: flags.Backend = None,
    precision: flags.Precision = None,
    batch_size: flags.BatchSize = None,
    image_size: flags.ImageSize = None,
    weights: flags.Weights = None,
    version: flags.Version = None,
    device: flags.Device = None,
    threads: flags.Threads = None,
    on_unsupported: flags.OnUnsupported = None,
    as_json: flags.Json = False,
    output: flags.Output = None,
) -> None:
    """Show the time, TFLOP/s and GB/s of every node in one run."""
    sizes = flags.batch_sizes(batch_size, (1,))
    if len(sizes) > 1:
        raise InputError(f"profile takes one batch size, got {', '.join(map(str, sizes))}")
    request = Request(
        model,
        weights,
        version,
        backend,
        precision,
        device,
        threads,
        on_unsupported,
        sizes,
        image_size,
    )
    target = open_target(request)
    engine = to_engine(target, request)
    batch = pictures.synthetic(sizes[0], target).to(engine.device)
    with working(f"profiling {target.name}"):
        found = engine.profile(batch)
    ran = precision_ran(engine)
    head = f"{target.name} on {engine.info.backend} in {ran}, batch {sizes[0]}"
    fields = {
        "model": target.name,
        "backend": engine.info.backend,
        "precision_ran": ran,
        "batch_size": sizes[0],
        **found.to_dict(),
    }
    emit("profile", f"{head}\n{found}", fields, as_json=as_json, output=output)
