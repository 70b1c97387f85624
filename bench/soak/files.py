"""Damaged weights, tables and pictures, many of them: refused or read, in little time and memory.

python -m bench.soak.files [--count 20000] [--seed 0] [--kinds weights,tables,pictures]

Case i of a seed is always the same. Each takes a sound file, changes bits and pieces of it (of a
.pth also those of the pickle inside, with its checksum made good), and gives it to `fastres.build`,
`CalibrationTable.load` or `Preprocess`. Well are an answer, BuildError and ValueError; every other
error is not, nor 5 s, nor 300 MB above the file, nor the end of the process. The exit status is 1
if one was not well, and the case is printed.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import random
import resource
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

import fastres
from bench.soak.supervisor import UNWELL, supervised
from fastres import CalibrationTable, Preprocess, models
from fastres.calib.decoding import KINDS
from fastres.errors import BuildError

SECONDS, MEMORY = 5.0, 300 << 20
HANGS = 60  # seconds after which a process is ended
Reader = Callable[[Path], object]
KINDS_OF_FILES = ("weights", "tables", "pictures")


def sources(kinds: tuple[str, ...]) -> list[tuple[str, bytes, Reader]]:
    """Sound files, each with what reads it."""
    found: list[tuple[str, bytes, Reader]] = []
    weights = models.cifar_resnet(8, seed=0).state_dict()
    if "weights" in kinds:
        for new in (True, False):
            made = io.BytesIO()
            torch.save(weights, made, _use_new_zipfile_serialization=new)
            found.append((".pth" if new else "old .pth", made.getvalue(), fastres.build))
        found.append((".safetensors", safetensors.torch.save(dict(weights)), fastres.build))
    if "tables" in kinds:
        data = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        table = fastres.quantize(fastres.build(weights), data, algorithm="mse")
        found.append(("table", table.to_json(), CalibrationTable.load))
    if "pictures" in kinds:
        Image.init()
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
        for kind in KINDS:
            if kind in Image.SAVE:
                made = io.BytesIO()
                picture.save(made, kind)
                found.append((kind, made.getvalue(), Preprocess(resize=18, crop=16)))
    return found


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Some bits, numbers or pieces of it changed, most of them near the beginning or anywhere."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        at = chance.randrange(chance.choice([len(changed), min(len(changed), 200)]) or 1)
        match chance.randrange(6):
            case 0 | 1 if changed:
                changed[at] ^= 1 << chance.randrange(8)
            case 2:
                changed[at : at + 4] = chance.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4)])
            case 3:
                del changed[at : at + chance.choice([1, 4, 100])]
            case 4:
                changed[at:at] = chance.randbytes(chance.choice([1, 8]))
            case _:
                changed = changed[: max(1, at)] if chance.random() < 0.1 else changed
    return bytes(changed)


def damaged_inside(data: bytes, chance: random.Random) -> bytes:
    """A zip file whose pickle is damaged, and whose checksums fit."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        for part in old.infolist():
            content = old.read(part)
            pickled = part.filename.endswith("data.pkl")
            new.writestr(part.filename, damaged(content, chance) if pickled else content)
    return made.getvalue()


def case(number: int, seed: int, files: list[tuple[str, bytes, Reader]], path: Path) -> str:
    """What became of one case: an answer, the kind of a refusal, or what was not well."""
    chance = random.Random(seed * 10**9 + number)
    name, data, read = chance.choice(files)
    inside = name == ".pth" and chance.random() < 0.6
    data = damaged_inside(data, chance) if inside else damaged(data, chance)
    path.write_bytes(data)
    begun, before = time.process_time(), _peak()
    try:
        read(path)
        kind = "answer"
    except (BuildError, ValueError) as error:
        kind = type(error).__name__
        if len(str(error)) > 1500:
            kind = f"BAD {name}: a message of {len(str(error))} letters"
    except Exception as error:
        kind = f"BAD {name}: {type(error).__name__}: {str(error)[:200]}"
    if (took := time.process_time() - begun) > SECONDS:
        kind = f"BAD {name}: {took:.1f} s"
    if (grown := _peak() - before) > MEMORY + 3 * len(data):
        kind = f"BAD {name}: {grown >> 20} MB"
    return kind


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def run_chunk(start: int, stop: int, seed: int, kinds: tuple[str, ...]) -> None:
    """Does some cases in this process, and prints each as it ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Pillow warns of much that is damaged
    files = sources(kinds)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(start, stop):
            faulthandler.dump_traceback_later(HANGS, exit=True)
            print(number, case(number, seed, files, Path(folder) / "file"), flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak.files", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS_OF_FILES))
    parser.add_argument("--chunk", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    kinds = tuple(given.kinds.split(","))
    if not set(kinds) <= set(KINDS_OF_FILES):
        parser.error(f"--kinds {given.kinds}: there are {', '.join(KINDS_OF_FILES)}")
    if given.chunk:
        run_chunk(*given.chunk, given.seed, kinds)
        return 0
    counts = supervised("bench.soak.files", ["--kinds", given.kinds], given.count, given.seed)
    return 1 if counts[UNWELL] else 0


if __name__ == "__main__":
    sys.exit(main())
