"""Forged engines, many of them: refused, or run as what they say, in little time and memory.

python -m bench.soak.engines [--count 20000] [--seed 0] [--calls 0.2] [-o FILE.json]

Case i of a seed is always the same. Each changes a sound engine at random (`forged_engines.py`),
makes its digests fit, loads it, and calls it. Well are a documented error, and outputs equal to
those of the graph that it says it is, node by node in PyTorch; all else is not, nor 5 s, nor 300 MB
above three times the file, nor the end of the process. The exit status is 1 if one was not well.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.utils._pytree as pytree

import fastres
from bench.soak.forged_engines import Files, Source, forged, sources
from bench.soak.supervisor import UNWELL, supervised
from fastres.backends.reference import ReferenceExecutable
from fastres.errors import ArtifactError, BackendUnavailable, InputError, UnsupportedError

SECONDS, MEMORY = 5.0, 300 << 20
HANGS = 30  # seconds after which a process is ended
DOCUMENTED = (ArtifactError, BackendUnavailable, InputError, UnsupportedError)


def case(number: int, seed: int, calls: float, known: Sequence[Source], folder: Path) -> str:
    """What became of one case: an answer, the kind of a refusal, or what was not well."""
    chance = random.Random(seed * 10**9 + number)
    source = chance.choice(known)
    files = forged(source.files, chance, calls)
    path = _written(files, folder / str(number))
    begun, before = time.process_time(), _peak()
    stage, took, grown = "loading", 0.0, 0
    try:
        with fastres.load(path, trust_engine=chance.random() < 0.5) as engine:
            stage = "calling"
            found = pytree.tree_leaves(engine(source.x))
            took, grown = time.process_time() - begun, _peak() - before
            kind = _compared(engine, source.x, found)
            kind = kind.replace("BAD", f"BAD {source.name}:")
    except DOCUMENTED as error:
        took, grown = time.process_time() - begun, _peak() - before
        kind = f"{type(error).__name__} {stage}"
        if len(str(error)) > 5000:
            kind = f"BAD {source.name}: a message of {len(str(error))} letters"
    except Exception as error:
        took, grown = time.process_time() - begun, _peak() - before
        kind = f"BAD {source.name} {stage}: {type(error).__name__}: {str(error)[:200]}"
    if took > SECONDS:
        kind = f"BAD {source.name}: {took:.1f} s {stage}"
    if grown > MEMORY + 3 * sum(map(len, files.values())):
        kind = f"BAD {source.name}: {grown >> 20} MB {stage}"
    return kind.replace("\n", " ")


def _compared(engine: fastres.Engine, x: torch.Tensor, found: Sequence[torch.Tensor]) -> str:
    """Against the meaning of its graph; what rounds to 8 bits may be a step away.

    Numbers beyond fp32 are not compared: inside of OpenVINO infinities and NaN are lost.
    """
    meant = ReferenceExecutable(engine.graph, torch.float32).run(engine.planar((x,)))
    if not all(bool(other.isfinite().all()) for other in meant):
        return "answer beyond fp32"
    coarse = engine.options.precision == "int8"
    for one, other in zip(found, meant, strict=True):
        one, other = one.double(), other.double()
        size = float(other.abs().max()) if other.numel() else 0.0
        slack = (0.1 if coarse else 1e-3) * size + 1e-30
        if not torch.allclose(one, other, rtol=0.0 if coarse else 1e-3, atol=slack, equal_nan=True):
            return "BAD another answer than its graph's"
    return "answer"


def _written(files: Files, path: Path) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def run_chunk(start: int, stop: int, seed: int, calls: float) -> None:
    """Does some cases in this process, and prints each as it ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        known = sources(Path(folder))
        for number in range(start, stop):
            faulthandler.dump_traceback_later(HANGS, exit=True)
            print(number, case(number, seed, calls, known, Path(folder)), flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak.engines", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=float, default=0.2, help="share with calls of PyTorch")
    parser.add_argument("-o", "--output", type=Path, help="also write the counts as JSON")
    parser.add_argument("--chunk", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.chunk:
        run_chunk(*given.chunk, given.seed, given.calls)
        return 0
    counts = supervised(
        "bench.soak.engines", ["--calls", str(given.calls)], given.count, given.seed
    )
    if given.output is not None:
        found = {"seed": given.seed, "calls": given.calls, **counts}
        given.output.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if counts[UNWELL] else 0


if __name__ == "__main__":
    sys.exit(main())
