"""The main job: real photographs through ResNet-50 v1 and v1.5, compiled, checked and timed;
then trained networks in fp32, bf16 and int8, accuracy and speed side by side.

    python examples/main_job.py
    python examples/main_job.py --weights resnet50.safetensors --version v1.5 --labels names.txt

Without `--weights` the ResNet-50s are untrained: their weights are random and then settled on the
photographs, so that the numbers are real but the classes mean nothing. The trained networks are two
small ones for digits (digits_job.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from digits_job import show as show_trained
from rich.console import Console
from rich.table import Table
from torch import nn

import fastres
from fastres.calib.images import find_images
from fastres.checkpoints.reading import read_weights
from fastres.errors import BuildError, FastresError, UnsupportedError
from fastres.parity.report import ParityReport
from fastres.timing.benchmark import Target
from fastres.timing.report import BenchReport

PHOTOS = Path(__file__).parent / "photos"
RELOAD = """
import sys, torch, fastres
engine = fastres.load(sys.argv[1])
saved = torch.load(sys.argv[2], weights_only=True)
print("true" if torch.equal(engine(saved["x"]), saved["y"]) else "false")
"""


def main() -> int:
    args = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 110)
    preprocess = fastres.Preprocess()
    paths = find_images(args.images)
    photos = preprocess.batch(paths)
    names = ", ".join(path.stem for path in paths)
    console.print(f"{len(paths)} photographs: {names}; batches of {args.batch_size}")
    batch = photos.repeat(-(-args.batch_size // len(photos)), 1, 1, 1)[: args.batch_size]
    device = "cuda" if torch.cuda.is_available() else "cpu"

    versions = [args.version] if args.weights else ["v1", "v1.5"]
    models = {version: _model(version, args.weights, photos) for version in versions}
    engines: dict[str, fastres.Engine] = {}
    reports: dict[str, ParityReport] = {}
    for version, model in models.items():
        for precision in args.precision.split(","):
            name = f"{version} {precision}"
            start = time.perf_counter()
            try:
                engine = fastres.compile(model, batch, precision=precision, preprocess=preprocess)
            except UnsupportedError as error:
                console.print(f"ResNet-50 {name} is left out: {str(error).splitlines()[0]}")
                continue
            seconds = time.perf_counter() - start
            console.print(f"ResNet-50 {version}: {engine!r}, compiled in {seconds:.1f} s")
            engines[name], reports[name] = engine, fastres.verify(model, engine, [batch])
    if not all(report.passed for report in reports.values()):
        for report in reports.values():
            console.print(str(report))
        return 1
    batch = batch.to(device)
    targets = [Target(f"{version} eager", model.to(device)) for version, model in models.items()]
    targets += [Target(name, engine) for name, engine in engines.items()]
    with console.status("timing, interleaved with eager PyTorch"):
        timed = fastres.benchmark(targets, {len(batch): batch}, duration_s=args.duration)
    console.print(_table(versions, reports, timed, len(batch)))
    console.print(f"measured on {timed.machine}")
    console.print("img/s is the mean over all calls, the ratio a median of paired rounds")
    for line in timed.unsteady:
        console.print(line)
    for name in engines:
        if name.startswith("v1.5 ") and name.replace("v1.5", "v1") in engines:
            against = timed.against(name.replace("v1.5", "v1")).of(name, len(batch))
            console.print(f"speed of {name} against v1: {against.speedup}")
    first = next(iter(engines.values()))
    same = _reload(first, batch)
    console.print(f"saved, loaded in a fresh process, run again: bit-identical {same}")
    _classes(console, first, paths, args)
    for engine in engines.values():
        engine.close()
    if not args.weights:
        show_trained(console, args.duration / 3)
    return 0 if same else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--images", type=Path, default=PHOTOS, help="image file or folder")
    parser.add_argument("--weights", type=Path, help="your own ResNet-50 weights")
    parser.add_argument("--version", choices=["v1", "v1.5"], help="which net the weights are of")
    parser.add_argument("--labels", type=Path, help="class names, one a line")
    parser.add_argument("--precision", default="fp32,bf16", help="one or several, by comma")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--duration", type=float, default=6.0, help="seconds a target is timed")
    args = parser.parse_args()
    if args.weights and not args.version:
        parser.error("--weights needs --version v1 or v1.5: the weights do not show it")
    if args.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    return args


def _model(version: str, weights: Path | None, photos: torch.Tensor) -> nn.Module:
    if weights is None:
        model = fastres.models.resnet50(version=version, seed=0)
        return fastres.models.settle(model, photos)
    table = read_weights(weights)
    if "fc.weight" not in table:
        raise BuildError(f"{weights} has no fc.weight: these are not the weights of a ResNet-50")
    model = fastres.models.resnet50(version=version, num_classes=len(table["fc.weight"]))
    try:
        model.load_state_dict(table)
    except RuntimeError as error:
        raise BuildError(f"{weights} does not fit ResNet-50: {error}") from error
    return model.eval()


def _table(
    versions: list[str], reports: dict[str, ParityReport], timed: BenchReport, size: int
) -> Table:
    table = Table(title=f"ResNet-50, batch {size}, against eager PyTorch in fp32 in the same run")
    columns = ("net", "parity", "error", "allowed", "p50 ms", "p99 ms", "img/s", "against eager")
    for column in columns:
        left = column in ("net", "parity")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for version in versions:
        names = [name for name in reports if name.startswith(f"{version} ")]
        rated = timed.against(f"{version} eager")
        for name in (f"{version} eager", *names):
            row = rated.of(name, size)
            checked = ("the reference", "", "")
            if name in reports:
                logits = reports[name].outputs[0]
                checked = ("PASSED", f"{logits.rms:.1e}", f"{logits.allowed_rms:.1e}")
            times = (f"{row.latency_ms['p50']:.1f}", f"{row.latency_ms['p99']:.1f}")
            rate = str(row.speedup) if name in reports else "1x"
            table.add_row(name, *checked, *times, f"{row.throughput:.1f}", rate)
        table.add_section()
    table.caption = "error: RMS of the logits relative to float64's; allowed: twice PyTorch's own"
    return table


def _reload(engine: fastres.Engine, batch: torch.Tensor) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path, tensors = Path(folder) / "resnet50.fastres", Path(folder) / "tensors.pt"
        engine.save(path)
        torch.save({"x": batch, "y": engine(batch)}, tensors)
        command = [sys.executable, "-c", RELOAD, str(path), str(tensors)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return bool(json.loads(result.stdout))


def _classes(
    console: Console, engine: fastres.Engine, paths: list[Path], args: argparse.Namespace
) -> None:
    if not args.weights:
        console.print("These weights are untrained: classes would mean nothing. Use --weights.\n")
        return
    labels = args.labels.read_text().splitlines() if args.labels else []
    for path, found in zip(paths, engine.predict(paths), strict=True):
        console.print(path.name)
        for index, probability in zip(found.classes, found.probabilities, strict=True):
            name = labels[index] if index < len(labels) else f"class {index}"
            console.print(f"  {probability:6.1%}  {name}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FastresError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
