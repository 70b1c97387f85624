"""Whether the residual networks of timm compile and agree with the model: one line for each.

python bench/zoo.py [NAMES ...] [--precision fp32] [--channels-last] [-o FILE.json] [--continue]

Without names: every name of timm that says resnet, resnext, resnest, res2net, senet or sknet.
Weights are random: norms are settled on photographs, and parameters that timm starts at one value
each get several. What the backend does not take runs in PyTorch. Needs timm (`pip install
'.[zoo]'`) and 20 GB of memory for the largest. Exit status 1 if a network fails its check or
crashes; a refusal is shown with its reason. The file is written after each network; --continue
leaves out those that it has, of the same options.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # as `python bench/zoo.py`, where only this folder is on the path
    sys.path.insert(0, str(Path(__file__).parents[1]))

import timm
import torch
from rich.table import Table
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import fastres
from bench.documents import check_output, headed
from bench.pictures import photographs
from fastres.cli.output import write_file
from fastres.errors import FastresError, first_line
from fastres.models import settle
from fastres.options import Precision
from fastres.text import json_text, render

RESIDUAL = re.compile(r"res(ne[xt]|nest|2ne[xt])|s[ek]net")
OTHERS = re.compile(r"^(densenet|resmlp|vit_)")  # whose names only contain one of these
SIDE = 96  # pixels, where a network takes any


@dataclass(frozen=True)
class Row:
    """What became of one network.

    Args:
        outcome: "passed", "failed", "refused" or "crashed".
        nodes: of the optimised graph.
        fallback: operators that PyTorch runs, and how many nodes of each.
        error, allowed: RMS of the output's error, and what `fastres.verify` allows.
        reason: why not.
    """

    name: str
    outcome: str
    parameters: int
    side: int
    nodes: int = 0
    fallback: tuple[tuple[str, int], ...] = ()
    error: float | None = None
    allowed: float | None = None
    reason: str = ""


def residual_names() -> list[str]:
    return [n for n in timm.list_models() if RESIDUAL.search(n) and not OTHERS.search(n)]


def views(side: int) -> torch.Tensor:
    """[12, 3, side, side]: quarters of the photographs, for statistics of more than a few."""
    whole = photographs(3, 2 * side)
    return torch.cat([part for half in whole.chunk(2, 2) for part in half.chunk(2, 3)])


def network(name: str, pictures: torch.Tensor) -> nn.Module:
    """With random weights of which every term matters, in eval()."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if not isinstance(module, _BatchNorm) and bool(
                    (parameter == parameter.max()).all()
                ):
                    parameter += 0.25 * torch.randn_like(parameter)
    return settle(model, pictures)


def examine(name: str, precision: Precision, channels_last: bool) -> Row:
    try:
        side = SIDE
        model = network(name, pictures := views(side))
    except Exception:  # timm's own, of many kinds, where a network takes its own size alone
        side = timm.get_pretrained_cfg(name).input_size[-1]
        model = network(name, pictures := views(side))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    count = sum(p.numel() for p in model.parameters())
    batches = [pictures[:4], pictures[4:5]]
    try:
        with fastres.compile(
            model, batches[0], precision=precision, on_unsupported="fallback"
        ) as engine:
            nodes = len(engine.graph.nodes)
            aside = Counter(node.op for node in engine.info.fallbacks)
            given = iter([engine(batch) for batch in batches])
        # the engine is gone when the model is copied to float64: the largest have gigabytes
        (output, *_) = fastres.verify(model, lambda x: next(given), batches).outputs
        return Row(
            name,
            "passed" if output.passed else "failed",
            count,
            side,
            nodes,
            tuple(sorted(aside.items())),
            output.rms,
            output.allowed_rms,
            output.reason,
        )
    except FastresError as error:
        return Row(name, "refused", count, side, reason=str(error))
    except Exception as error:  # this is what the table is for
        return Row(name, "crashed", count, side, reason=first_line(error))


def shown(found: Sequence[Row]) -> str:
    table = Table(title="timm's residual networks")
    for column in ("network", "outcome", "million weights", "pixels", "nodes", "error", "allowed"):
        table.add_column(column)
    table.add_column("run by PyTorch, or why not", overflow="fold")
    for row in found:
        ops = ", ".join(f"{count} {op}" for op, count in row.fallback)
        table.add_row(
            row.name,
            row.outcome,
            f"{row.parameters / 1e6:.1f}",
            str(row.side),
            str(row.nodes or ""),
            *("" if x is None else f"{x:.1e}" for x in (row.error, row.allowed)),
            row.reason or ops,
        )
    totals = Counter(row.outcome for row in found)
    return f"{render(table)}\n{', '.join(f'{n} {what}' for what, n in totals.items())}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of timm; all residual ones if none is given")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--channels-last", action="store_true", help="of the model")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="an earlier run")
    parser.add_argument("-o", "--output", type=Path, help="also write the table as JSON")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.names if not timm.is_model(name)]:
        parser.error(f"timm has no {', '.join(unknown)}")
    check_output(parser, given.output)
    document = headed("zoo", time.time(), timm=timm.__version__)
    found = {row.name: row for row in kept(given)}
    names = [name for name in given.names or residual_names() if name not in found]
    for i, name in enumerate(names):
        row = examine(name, given.precision, given.channels_last)
        found[name] = row
        said = f"{i + 1}/{len(names)} {name}: {row.outcome} {row.reason}"
        print(said, file=sys.stderr, flush=True)
        if given.output is not None:
            document["networks"] = [asdict(row) for row in found.values()]
            write_file(given.output, json_text({**document, "options": options(given)}))
        gc.collect()
    print(shown(list(found.values())))
    return int(any(row.outcome in ("failed", "crashed") for row in found.values()))


def options(given: argparse.Namespace) -> dict[str, Any]:
    return {"precision": given.precision, "channels_last": given.channels_last}


def kept(given: argparse.Namespace) -> list[Row]:
    """What an earlier run with the same options has written."""
    if not given.go_on or given.output is None or not given.output.exists():
        return []
    document = json.loads(given.output.read_text())
    if document["options"] != options(given):
        return []
    rows = (Row(**row) for row in document["networks"])
    return [replace(row, fallback=tuple(map(tuple, row.fallback))) for row in rows]


if __name__ == "__main__":
    sys.exit(main())
