"""Everything that a GPU is to be asked, in one run: right first, then tuned, then how fast.

python bench/gpu.py [--out DIR] [--budget SECONDS] [--only SECTION,...]     (or: make gpu)

Each section runs in a process of its own and adds lines to DIR/gpu.jsonl; a run that was broken
off goes on where it was. It needs PyTorch, Triton and this package, no network and no OpenVINO. The
exit status is 1 if a result was wrong.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from gpu_sections import NETS, PRECISIONS, SECTIONS, Run


def work(section: str, run: Run) -> int:
    """One section in this process: its rows, each kept as soon as it is there."""
    known = {row["name"] for row in run.rows(section) if "error" not in row}
    rows, known_already, status = SECTIONS[section][0](run), False, 0
    while time.time() < run.until:
        try:
            row = rows.send(known_already) if known_already else next(rows)
            known_already = False
            if row.pop("asked", False):
                known_already = row["name"] in known
                continue
            if row["name"] in known:
                continue
        except StopIteration:
            return status
        except Exception:
            run.keep(section, {"name": "stopped", "error": traceback.format_exc()[-2000:]})
            return 1
        run.keep(section, row)
        print(section, row["name"], row.get("right", ""), row.get("table", ""), flush=True)
        status = max(status, int(row.get("right") is False))
    run.keep(section, {"name": "stopped", "error": "out of time"})
    return status


def drive(given: argparse.Namespace) -> int:
    """Every section in turn, within the budget."""
    end, status = time.time() + given.budget, 0
    sections = given.only.split(",")
    for section in sections:
        left = end - time.time()
        if left < 10:
            print(f"{section}: no time left", flush=True)
            continue
        limit = left if len(sections) == 1 else min(left, SECTIONS[section][1])
        command = [sys.executable, __file__, *_passed_on(given), "--section", section]
        command += ["--until", str(time.time() + limit)]
        try:
            done = subprocess.run(command, timeout=limit + 30)
            status = max(status, done.returncode)
        except subprocess.TimeoutExpired:
            print(f"{section}: hung, and was stopped", flush=True)
            status = 1
    return int(status != 0)


def _passed_on(given: argparse.Namespace) -> list[str]:
    names = ("out", "device", "nets", "precisions", "batch_sizes", "image_size")
    return [f"--{name.replace('_', '-')}={getattr(given, name)}" for name in names]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="where results go")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds in all")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, in order")
    parser.add_argument("--device", default="cuda", help="cpu with TRITON_INTERPRET=1, for tests")
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--batch-sizes", default="256,1,32,8,128")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    unknown = set(given.only.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"--only {given.only}: the sections are {', '.join(SECTIONS)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "there is no CUDA device here; to try the script: TRITON_INTERPRET=1 and "
            "--device cpu with small --nets and --image-size"
        )
    given.out.mkdir(parents=True, exist_ok=True)
    if given.section is None:
        return drive(given)
    os.environ.setdefault("TRITON_CACHE_DIR", str(given.out / "triton_cache"))
    sizes = [int(size) for size in given.batch_sizes.split(",")]
    device = torch.device(given.device)
    nets, precisions = given.nets.split(","), given.precisions.split(",")
    run = Run(given.out, device, nets, precisions, sizes, given.image_size, given.until)
    return work(given.section, run)


if __name__ == "__main__":
    raise SystemExit(main())
