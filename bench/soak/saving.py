"""Savers of one path, killed at random moments, and readers beside them: the old or the new engine.

python -m bench.soak.saving [--kills 400] [--seed 0]

Two processes save two engines over and over, one of them is killed and started again; meanwhile the
path is read. Ends with 1 if anything else than one of the two was ever read, or something is left.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import fastres
from bench.children import environment
from fastres import artifact
from fastres.artifact.container import open_container, write

SAVER = """
import sys
from pathlib import Path
from fastres.artifact.container import open_container, write
found = [open_container(Path(name)) for name in sys.argv[1:3]]
engines = [{name: one.read(name) for name in one.sizes} for one in found]
while True:
    for files in engines:
        write(Path(sys.argv[3]), files)
"""


def soak(form: str, kills: int, chance: random.Random, folder: Path) -> Counter[str]:
    names = [folder / "old", folder / "new"]
    known = {len(artifact.read(name).graph.nodes): name.name for name in names}
    place = folder / f"beside {form}"
    place.mkdir()
    path = place / form
    first = open_container(names[0])
    write(path, {name: first.read(name) for name in first.sizes})
    line = [sys.executable, "-c", SAVER, *map(str, names), str(path)]
    savers = [subprocess.Popen(line, env=environment()) for _ in range(2)]
    counts: Counter[str] = Counter()
    for _ in range(kills):
        until = time.monotonic() + chance.uniform(0.2, 0.6)  # a saver has begun by then
        while time.monotonic() < until:
            try:
                counts[known[len(artifact.read(path).graph.nodes)]] += 1
            except Exception as error:  # which there is none of
                counts[f"{type(error).__name__}: {error}"] += 1
        savers[0].kill()
        savers[0].wait()
        savers = [savers[1], subprocess.Popen(line, env=environment())]
    for saver in savers:
        saver.kill()
        saver.wait()
    write(path, {name: first.read(name) for name in first.sizes})
    counts["left beside it"] = len(os.listdir(place)) - 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak.saving", description=__doc__)
    parser.add_argument("--kills", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance, wrong = random.Random(arguments.seed), 0
    x = torch.zeros(1, 3, 32, 32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for depth, called in ((8, "old"), (14, "new")):
            net = fastres.models.cifar_resnet(depth, seed=0).eval()
            fastres.compile(net, x, backend="reference").save(folder / called)
        for form in ("engine", "engine.fastres"):
            counts = soak(form, arguments.kills, chance, folder)
            print(f"{form}: {arguments.kills} savers killed, read {dict(counts)}", flush=True)
            wrong += sum(n for kind, n in counts.items() if kind not in ("old", "new"))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
