"""Every distinct kernel of whole networks compiled for many GPUs, none of which need be here.

python -m bench.kernels [--quick] [--sm 80,90] [--out FILE.json] [--tables DIR]   (or: make kernels)

A tile whose kernel spills or does not fit gives way to the next, which is said. Checked for each
kernel of the plans that come out: no spills, shared memory within the target's, the matrix
instruction that the target is to have, no 2-byte loads where channels come in eights. The exit
status is 1 if one fails. Triton's cache makes a second run quick. --tables writes what came out as
tables of tiles, which fastres ships for GPUs that it has not been measured on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

import fastres
from bench.quantised import in_precision
from fastres import models
from fastres.backends.triton.planning.eight_bits import FLOAT_OF
from fastres.backends.triton.planning.plan import Plan
from fastres.backends.triton.planning.table import (
    TYPICAL,
    Entry,
    Machine,
    Table,
    Tiles,
    kernels_digest,
    write_table,
)
from fastres.backends.triton.running.pack import Packed
from fastres.backends.triton.shipping.cross import compiled_plan, launches_of, spill_limit
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.kernels.aot import KernelFacts, fits, key_of, narrow_loads
from fastres.kernels.aot.faults import byte_faults
from fastres.kernels.compiled.build import Built
from fastres.kernels.cost import Target
from fastres.kernels.launch import Launch
from fastres.kernels.quantised import is_bytes
from fastres.options import Precision

SMS = (80, 86, 89, 90, 100, 120)
BATCHES = (1, 32, 256)
NETS = ("resnet18", "resnet50@v1", "resnet50@v1.5", "resnet152@v1.5", "resnext50_32x4d")
OTHERS: tuple[Precision, ...] = ("bf16", "tf32", "fp32", "fp8")  # on one network; fp16 on all
MATRIX = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@dataclass(frozen=True)
class Case:
    """One network in one precision at one batch size."""

    net: str
    precision: Precision
    batch: int


def cases(sm: int, quick: bool) -> Iterator[Case]:
    """All of a target's, or a few that hold every kernel family."""
    if quick:
        yield Case("resnet50@v1.5", "fp16", 256)
        yield Case("resnet50@v1.5", "fp16", 1)
        return
    for net in NETS:
        for batch in BATCHES:
            yield Case(net, "fp16", batch)
    for batch in BATCHES:
        yield Case("resnet50@v1.5", "int8", batch)
    for precision in OTHERS:
        if precision != "fp8" or sm >= 89:
            yield Case("resnet50@v1.5", precision, 32)


def graph_of(net: str) -> Graph:
    """The optimised graph of a network with random weights."""
    name, _, version = net.partition("@")
    more = {"version": version} if version else {}
    weights = getattr(models, name)(seed=0, **more).state_dict()
    return optimise(fastres.build(weights, version=version or "v1.5"))


def kernels(
    graph: Graph, case: Case, tiles: Tiles, known: dict[str, Built]
) -> tuple[Plan, list[tuple[str, str, Launch]]]:
    """The network's plan; and its launches: the node each is for, the kernel's key, the call."""
    shape = (case.batch, 3, 224, 224)
    graph = in_precision(graph, (1, 3, 64, 64), case.precision)
    plan, _ = compiled_plan(graph, (shape,), case.precision, tiles, known)
    constants = Packed(graph, FLOAT_OF[case.precision], torch.device("meta"))
    return plan, [
        (node, key_of(launch), launch)
        for node, launch in launches_of(plan, constants, tiles.target)
    ]


def write_tables(tiles: Tiles, chosen: Collection[str], folder: Path) -> None:
    """The tiles that plans took, estimated and compiled, for the target's typical GPU."""
    entries = {
        problem.key: Entry(dict(vars(best.tile)), round(1e6 * best.seconds, 2), measured=False)
        for problem in tiles.asked()
        if problem.key in chosen and not (best := tiles.best(problem)).measured
    }
    if (name := TYPICAL.get(tiles.target.sm)) is not None:
        machine = Machine(name, tiles.target.sm_count, triton.__version__, kernels_digest())
        write_table(folder / machine.file, Table(machine, entries))
        print(f"{folder / machine.file}: {len(entries)} tiles", flush=True)


def faults(launch: Launch, facts: KernelFacts, sm: int, precision: Precision) -> list[str]:
    """What is not as it should be."""
    found = []
    if max(facts.spill_stores, facts.spill_loads) > spill_limit(sm):
        found.append(f"{facts.spill_stores} bytes spilled")
    if launch.dependent and facts.unguarded:
        found.append(f"{facts.unguarded} accesses before the wait for the kernel in front")
    if is_bytes(next(launch.tensors()).dtype):
        return found + byte_faults(launch, facts, sm)
    if not fits(facts, sm):
        found.append(f"{facts.shared_bytes} bytes of shared memory")
    x = launch.arguments.get("x_ptr")
    if isinstance(x, torch.Tensor) and launch.constants["C"] * x.element_size() % 16 == 0:
        if narrow := narrow_loads(launch, facts):
            found.append(f"{narrow} loads of 1 or 2 bytes")
    multiplies = "BLOCK_K" in launch.constants or "DEPTH" in launch.constants
    if multiplies and precision != "fp32":
        wanted = MATRIX[sm]
        if not facts.count(wanted):
            found.append(f"no {wanted}")
        if wanted != "HMMA" and facts.count("HMMA"):
            found.append(f"HMMA beside {wanted}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="one network, fp16, batch 256 and 1")
    parser.add_argument("--sm", default=",".join(map(str, SMS)), help="targets")
    parser.add_argument("--out", type=Path, help="also write every kernel's facts as JSON")
    parser.add_argument("--tables", type=Path, help="also write tables of tiles into this folder")
    given = parser.parse_args(arguments)
    started, rows, bad = time.time(), [], 0
    graphs: dict[str, Graph] = {}
    for sm in map(int, given.sm.split(",")):
        tiles, known, seen = Tiles(Target.typical(sm)), dict[str, Built](), set[str]()
        chosen: set[str] = set()
        for case in cases(sm, given.quick):
            graph = graphs.setdefault(case.net, graph_of(case.net))
            plan, launches = kernels(graph, case, tiles, known)
            chosen.update(choice.problem for choice in plan.choices)
            for node, key, launch in launches:
                if key in seen:
                    continue
                seen.add(key)
                rows.append(_row(case, node, launch, known[key].facts, sm))
                if found := rows[-1]["faults"]:
                    bad += 1
                    print(f"sm_{sm} {case.net} {case.batch} {case.precision} {node}: {found}")
        for why in tiles.banned.values():
            print(f"sm_{sm}, gave way to another tile: {why}")
        count = sum(row["sm"] == sm for row in rows)
        print(f"sm_{sm}: {count} kernels, {time.time() - started:.0f} s so far", flush=True)
        if given.tables is not None:
            write_tables(tiles, chosen, given.tables)
    print(f"{len(rows)} kernels with Triton {triton.__version__}, {bad} with faults")
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1))
    return int(bad > 0)


def _row(case: Case, node: str, launch: Launch, facts: KernelFacts, sm: int) -> dict[str, Any]:
    blocks = {k: v for k, v in launch.constants.items() if k.startswith(("BLOCK", "BOX", "CHUNK"))}
    return {
        "sm": sm,
        **vars(case),
        "node": node,
        "kernel": launch.kernel.__name__,
        "tile": {**blocks, "warps": launch.num_warps, "stages": launch.num_stages},
        "registers": facts.registers,
        "shared_bytes": facts.shared_bytes,
        "faults": faults(launch, facts, sm, case.precision),
    }


if __name__ == "__main__":
    sys.exit(main())
