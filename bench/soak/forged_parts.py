"""Compiled parts that mislead: every digest fits, and what plans and kernels say is changed.

For `parts.py`. An engine is sound but for its plans, linked plans, and headers of kernels.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

import fastres
from bench.soak.forged_engines import TEXTS, WHOLE, Files, Json, leaf, leaves
from fastres import models
from fastres.artifact.container import MANIFEST, SEAL, seal
from fastres.backends.triton.planning import lower
from fastres.backends.triton.planning.overlap import with_overlap
from fastres.backends.triton.planning.table import Tiles
from fastres.backends.triton.shipping.stored import PLANS, Stored, write_plans
from fastres.backends.triton.shipping.stored_kernels import KERNELS
from fastres.errors import ArtifactError
from fastres.graph.ir import Graph
from fastres.kernels.cost import Target

TILES = (
    *(1, 2, 3, 4, 8, 15, 16, 24, 32, 64, 128, 256, 512, 1024),
    *(0, -1, -16, 10**6, 10**9, 2**31, 2**32, 2**62, 2**63),
)
SHAPES = {"cifar": (2, 3, 16, 16), "wide": (3, 3, 32, 32)}
MANY = 20_000  # times that a plan, a step or a kernel stands in a file


def sources(folder: Path) -> None:
    """Saves two engines for an sm_90, which between them have most forms of launches."""
    blocks = (2, 1, 1, 1)
    nets = {
        "cifar": models.cifar_resnet(8, seed=0),
        "wide": models.ResNet(models.Bottleneck, blocks, version="v1.5", planes=16, seed=0),
    }
    for name, net in nets.items():
        shape = fastres.Input(SHAPES[name])
        with fastres.compile(net.eval(), shape, target="sm_90", precision="fp16") as engine:
            engine.save(folder / name)


def forged(files: Files, chance: random.Random, graph: Graph) -> Files:
    """The engine with changed parts, and digests that fit."""
    made = dict(files)
    if chance.random() < 0.3:  # other tiles, and all that follows from them
        document = json.loads(made[PLANS])
        for _ in range(chance.choice([1, 1, 2, 4])):
            _tile(document, chance)
        made[PLANS] = _fitted(json.dumps(document).encode(), graph)
        return resealed(made)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        name = chance.choice([PLANS, PLANS, KERNELS])
        document = json.loads(made[name])
        change = chance.choice(_CHANGES)
        change(document, chance)
        made[name] = json.dumps(document, separators=(",", ":")).encode()
    return resealed(made)


def _fitted(text: bytes, graph: Graph) -> bytes:
    """Plans with the memory and the choices that follow from their tiles, where any do."""
    target = Target.typical(90)
    try:
        stored = msgspec.json.decode(text, type=Stored)
        steps = {step.node: step for step in stored.plans[0].steps}
        shapes = stored.plans[0].input_shapes
        plan = lower._Planner(graph, shapes, "fp16", Tiles(target), steps).plan()
    except (ArtifactError, ValueError, msgspec.MsgspecError):
        return text
    plan = with_overlap(plan, target, stored.plans[0].dependent)
    return write_plans(stored.target, [plan], ())[PLANS]


def resealed(files: Files) -> Files:
    manifest = json.loads(files[MANIFEST])
    entries = {n: d for n, d in files.items() if n not in (MANIFEST, SEAL)}
    manifest["files"] = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in entries.items()
    }
    made = {**entries, MANIFEST: json.dumps(manifest, indent=2).encode()}
    return {**made, SEAL: seal(made[MANIFEST])}


def _any_leaf(document: Json, chance: random.Random) -> None:
    leaf(document, chance)


def _tile(document: Json, chance: random.Random) -> None:
    """Other sizes of a tile, of its type or of another step's."""
    steps = [s for p in document["plans"] for s in p.get("steps", ()) if "tile" in s]
    if not steps:
        return leaf(document, chance)
    step = chance.choice(steps)
    if chance.random() < 0.1:
        step["tile"] = chance.choice(steps)["tile"]
    for _ in range(chance.choice([1, 1, 2])):
        holder, key = chance.choice(list(leaves(step["tile"])))
        holder[key] = chance.choice(TILES)
    return None


def _sequence(document: Json, chance: random.Random) -> None:
    """Steps, launches or kernels reordered, taken away, doubled, or there many times."""
    plan = chance.choice(document["plans"] or [{}])
    kinds = [
        (holder, key)
        for holder, key in ((plan, "steps"), (plan, "launches"), (plan, "choices"))
        if key in holder
    ]
    holder, key = chance.choice([*kinds, (document, "kernels"), (document, "plans")])
    rows = holder[key]
    if not rows:
        return
    match chance.randrange(6):
        case 0:
            rows.remove(chance.choice(rows))
        case 1:
            chance.shuffle(rows)
        case 2:
            rows.insert(chance.randrange(len(rows)), copy.deepcopy(chance.choice(rows)))
        case 3:
            row = chance.choice(rows)
            size = len(json.dumps(row))
            holder[key] = [row] * min(MANY, 2**24 // size) + rows
        case 4:
            holder[key] = []
        case _:
            at = chance.randrange(len(rows))
            rows[at] = copy.deepcopy(chance.choice(rows))
            leaf(rows[at], chance)


def _place(document: Json, chance: random.Random) -> None:
    """Memory elsewhere, or of another size."""
    number = chance.choice([*WHOLE, 16, 32, 4096])
    plan = chance.choice(document["plans"] or [{}])
    if chance.random() < 0.3:
        plan["arena_bytes"] = number
    elif "places" in plan:
        place = chance.choice(list(plan["places"].values()) or [{}])
        place[chance.choice(["offset", "offset", "dtype"])] = number
        if chance.random() < 0.5:
            place["shape"] = [chance.choice(WHOLE) for _ in range(chance.randrange(6))]
    elif plan.get("launches"):
        launch = chance.choice(plan["launches"])
        spots = [a for a in launch["arguments"].values() if isinstance(a, dict)] or [{}]
        for holder, key in leaves(chance.choice(spots)):
            if isinstance(holder[key], int) and chance.random() < 0.5:
                holder[key] = number
        if chance.random() < 0.3:
            launch[chance.choice(["programs", "kernel", "step"])] = number


def _shapes(document: Json, chance: random.Random) -> None:
    plan = chance.choice(document["plans"] or [{}])
    size = [chance.choice([*WHOLE, 3, 16, 32]) for _ in range(chance.choice([0, 2, 4, 4, 4, 9]))]
    plan["input_shapes"] = chance.choice([[], [size], [size] * 3, [size] * MANY])


def _names(document: Json, chance: random.Random) -> None:
    """One name by another, everywhere or once; texts that steer a terminal."""
    texts = [(h, k) for h, k in leaves(document) if isinstance(h[k], str)]
    holder, key = chance.choice(texts)
    holder[key] = chance.choice([*TEXTS, "\x1b]0;x\x07\x1b[2J" * 50, "a\nb", "A" * 10**6])
    if chance.random() < 0.3:  # another name that there is, in its place everywhere
        old, new = (h[k] for h, k in chance.sample(texts, 2))
        for holder, key in texts:
            if holder[key] == old:
                holder[key] = new


def _constants(document: Json, chance: random.Random) -> None:
    """Packed constants by keys that no plan has."""
    keys = [
        a
        for p in document["plans"]
        for launch in p.get("launches", ())
        for a in launch["arguments"].values()
        if isinstance(a, dict) and "key" in a
    ]
    if not keys:
        return _tile(document, chance)
    found = chance.choice(keys)
    kinds = "filters matrix interleaved grouped stem rows bias products scale shift factors".split()
    names = [k["key"][1] for k in keys if len(k["key"]) > 1]
    more = [
        chance.choice([*names, *names, 0, 1, -1, 0.5, 1e308, None, 3])
        for _ in range(chance.choice([0, 1, 1, 2, 2, 3, 5, MANY]))
    ]
    found["key"] = [chance.choice(kinds), *more]
    return None


_CHANGES: tuple[Callable[[Json, random.Random], Any], ...] = (
    *(_any_leaf, _any_leaf, _tile, _tile, _tile, _sequence, _place, _shapes, _names),
    _constants,
)
