"""What compiling over and over keeps, in kB a round: torch.export alone, and ours around it.

python -m bench.soak.leaks [--rounds 200]

Each line by least squares over the last three quarters of the rounds, after collecting garbage and
giving free memory back to the system. Ends with 1 if one of ours keeps more than 20 kB.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import fastres

MOST = 20.0  # kB
X = torch.zeros(2, 3, 32, 32)


def resident() -> float:
    """kB of memory that the process has now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def kept(act: Callable[[], object], rounds: int) -> float:
    for _ in range(20):
        act()
    found = []
    for number in range(rounds):
        act()
        if number % 8 == 7:
            found.append((number, resident()))
    number, memory = np.array(found[len(found) // 4 :]).T
    return float(np.polyfit(number, memory, 1)[0])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak.leaks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    net = fastres.models.cifar_resnet(8, seed=0).eval()
    free = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(net, (X,), dynamic_shapes=free)
    engine = fastres.compile(net, X, threads=1)
    state = {name: value.clone() for name, value in net.state_dict().items()}

    def compiled(model: object) -> None:
        with fastres.compile(model, X if model is net else None, threads=1) as made:  # type: ignore
            made(X)

    ours: dict[str, Callable[[], object]] = {
        "compile a program, call, close": lambda: compiled(program),
        "update_weights": lambda: engine.update_weights(state),
        "compile, call, close": lambda: compiled(net),
    }
    worst = 0.0
    for name, act in ours.items():
        found = kept(act, rounds)
        worst = max(worst, found)
        print(f"{name:32}{found:9.1f} kB a round", flush=True)
    alone = kept(lambda: torch.export.export(net, (X,), dynamic_shapes=free), rounds)
    print(f"{'torch.export alone':32}{alone:9.1f} kB a round")
    return int(worst > MOST)


if __name__ == "__main__":
    sys.exit(main())
