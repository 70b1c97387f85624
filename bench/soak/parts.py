"""Engines with forged compiled parts, many of them: refused, or run as if the parts were sound.

python -m bench.soak.parts [--count 3000] [--seed 0] [--interpret] [-o FILE.json]

Case i of a seed is always the same. Each changes plans and tables of the machine code of a sound
engine (`forged_parts.py`), and loads it in one of the ways that read them: to be looked at, to be
run by the JIT's runner or by the driver's (a stand-in, which launches nothing), or deployed; with
--interpret in Triton's interpreter, where it is called and compared with PyTorch. Well are a
documented error, the launches of the sound engine, and its numbers; all else is not, nor 5 s, nor
300 MB above three times the file, nor the end of the process. The exit status is 1 if one was not.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import fastres
from bench.soak.forged_parts import SHAPES, Files, forged, sources
from bench.soak.supervisor import UNWELL, supervised
from fastres import artifact, deploy
from fastres.backends.reference import ReferenceExecutable
from fastres.backends.triton import backend
from fastres.backends.triton.running.run_driver import DriverRunner
from fastres.backends.triton.shipping import cross, machine_code
from fastres.deploy import triton as deploy_triton
from fastres.errors import (
    ArtifactError,
    BackendUnavailable,
    InputError,
    OutOfMemory,
    UnsupportedError,
)
from fastres.graph.ir import Graph
from fastres.kernels.compiled.binary import KernelBinary
from fastres.kernels.compiled.tensor_map import TensorMap

SECONDS, MEMORY = 5.0, 300 << 20
HANGS = 30  # seconds after which a process is ended; of a call in the interpreter, ten times that
DOCUMENTED = (ArtifactError, BackendUnavailable, InputError, OutOfMemory, UnsupportedError)
GPU_BYTES, GPU_START = 80 << 30, 1 << 40
ERROR = 5e-3  # of fp16, where only the order of sums may differ


class Known(NamedTuple):
    """A sound engine: its files, and its graph."""

    files: Files
    graph: Graph


class Driver:
    """In the place of a GPU: has addresses and no memory, and writes down what is launched."""

    launched: list[tuple[str, int, int]] = []

    def __init__(self, kernels: Sequence[KernelBinary], device: object = None) -> None:
        self.headers = tuple(kernel.header for kernel in kernels)
        self.taken = 0

    def encode(self, tensor: TensorMap) -> bytes:
        return hashlib.sha512(repr(tensor.sizes).encode()).digest() * 2

    def launch(self, kernel: int, arguments: Sequence[bytes], programs: int) -> None:
        Driver.launched.append((self.headers[kernel].kernel, programs, len(arguments)))

    def allocate(self, size: int) -> int:
        at = self.taken
        self.taken += -(-size // 256) * 256
        if size < 0 or self.taken > GPU_BYTES:
            raise RuntimeError("cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY")
        return GPU_START + at

    def write(self, address: int, array: object) -> None:
        pass

    def read(self, array: Any, address: int) -> None:
        array.fill(0)

    def wait(self) -> None:
        pass


class Compiles(Exception):
    """That an engine would be compiled anew, which takes seconds, and nothing of its file."""


def _compiles(*_: object) -> Any:
    raise Compiles


def looked_at(path: Path, trust: bool, name: str) -> str:
    with fastres.load(path, target="sm_90", trust_engine=trust) as engine:
        json.dumps(engine.info.to_dict())
        letters = len(str(engine.info))
        engine.save(path.with_name("again"))
    return "looked at" if letters < 1 << 20 else f"BAD {letters} letters"


def lowered(path: Path, trust: bool, name: str) -> str:
    with fastres.load(path, trust_engine=trust) as engine:
        assert len(str(engine.info)) < 1 << 20
        executable: Any = engine._lowered.executable
        runner = executable._runner((SHAPES[name],))
        if not isinstance(runner, DriverRunner):
            with runner.context():
                return "lowered"
        Driver.launched = []
        engine(torch.zeros(SHAPES[name]))
    return "lowered for the driver"


def deployed(path: Path, trust: bool, name: str) -> str:
    engine = deploy.load(path, trust_engine=trust)
    engine(np.zeros(SHAPES[name], np.float32))
    return "deployed"


def interpreted(path: Path, trust: bool, name: str) -> str:
    begun = time.process_time()
    with fastres.load(path, trust_engine=trust) as engine:
        took = time.process_time() - begun
        executable: Any = engine._lowered.executable
        plan = executable._runner((SHAPES[name],)).plan
        made = hashlib.sha256(repr(plan.steps).encode()).hexdigest()
        if took > SECONDS:
            return f"BAD {took:.1f} s"
        if made in _CALLED:
            return "loaded, called before"
        _CALLED.add(made)
        x = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(0))
        faulthandler.dump_traceback_later(10 * HANGS, exit=True)
        found = engine(x)
        (meant,) = ReferenceExecutable(engine.graph, torch.float32).run((x,))
    error = float((found.float() - meant).square().mean() / meant.square().mean()) ** 0.5
    return "called" if error < ERROR else f"BAD numbers, {error:.1e} off"


_CALLED: set[str] = set()


def case(number: int, seed: int, known: dict[str, Known], folder: Path, interpret: bool) -> str:
    """What became of one case: how it was taken, the kind of a refusal, or what was not well."""
    chance = random.Random(seed * 10**9 + number)
    name = chance.choice(sorted(known))
    sound, graph = known[name]
    files, path = forged(sound, chance, graph), folder / str(number)
    path.mkdir()
    for file, data in files.items():
        (path / file).write_bytes(data)
    way = interpreted if interpret else chance.choice([looked_at, lowered, lowered, deployed])
    trust = chance.random() < 0.7
    begun, before = time.process_time(), _peak()
    try:
        kind = way(path, trust, name)
    except Compiles:
        kind = "compiles anew"
    except DOCUMENTED as error:
        kind, text = type(error).__name__, str(error)
        if len(text) > 5000 or "\x1b" in text:
            kind = f"BAD message of {len(text)} letters"
    except Exception as error:
        kind = f"BAD {type(error).__name__}: {str(error)[:200]}"
    took, grown = time.process_time() - begun, _peak() - before
    if took > SECONDS and not interpret:
        kind = f"BAD {took:.1f} s, {kind}"
    if grown > MEMORY + 3 * sum(map(len, files.values())):
        kind = f"BAD {grown >> 20} MB, {kind}"
    told = f"{name} {way.__name__} {'trusted' if trust else 'untrusted'}"
    return (f"{kind} ({told})" if kind.startswith("BAD") else kind).replace("\n", " ")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def run_chunk(start: int, stop: int, seed: int, interpret: bool, sound: Path) -> None:
    """Does some cases in this process, and prints each as it ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known = {
        part.name: Known(
            {f.name: f.read_bytes() for f in part.iterdir()}, artifact.read(part).graph
        )
        for part in sound.iterdir()
    }
    if not interpret:
        _stand_in()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(start, stop):
            faulthandler.dump_traceback_later(HANGS, exit=True)
            print(number, case(number, seed, known, Path(folder), interpret), flush=True)


def _stand_in() -> None:
    """Lets the CPU pass for an sm_90, and compiles nothing."""
    machine_code.CudaDriver = Driver  # type: ignore[assignment, misc]
    deploy_triton.CudaGpu = lambda kernels, device: Driver(kernels)  # type: ignore[assignment, misc]
    backend.TritonBackend.unavailable = lambda *_: None  # type: ignore[assignment, method-assign]
    cross.compiled_plan = _compiles  # type: ignore[assignment]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak.parts", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interpret", action="store_true", help="call, in Triton's interpreter")
    parser.add_argument("-o", "--output", type=Path, help="also write the counts as JSON")
    parser.add_argument("--chunk", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--sound", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.chunk:
        run_chunk(*given.chunk, given.seed, given.interpret, given.sound)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        sources(Path(folder))  # by Triton's compiler, which the interpreter turns off
        if given.interpret:
            os.environ["TRITON_INTERPRET"] = "1"
        flags = ["--sound", folder, *(["--interpret"] if given.interpret else [])]
        counts = supervised("bench.soak.parts", flags, given.count, given.seed)
    if given.output is not None:
        given.output.write_text(json.dumps({"seed": given.seed, **counts}, indent=1) + "\n")
    return 1 if counts[UNWELL] else 0


if __name__ == "__main__":
    sys.exit(main())
