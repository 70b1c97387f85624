"""Where the time of one run went: per node and per group of layers."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastres.backends.base import NodeTime
from fastres.errors import InputError
from fastres.graph.cost import Shapes, multiply_adds, traffic
from fastres.graph.ir import Graph, op_name
from fastres.options import PathLike
from fastres.text import empty_table, json_text, render

if TYPE_CHECKING:
    from rich.table import Table

_ITEMSIZE = {"fp64": 8, "fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}
_STAGE = re.compile(r"(?:.*?\.)??(?:layer|stages?[._]?|blocks?[._]?)\d+(?=\.|$)")


@dataclass(frozen=True)
class Row:
    """Time of a node or a group, and what it achieved in it.

    Args:
        op: empty for a group, and for a step that is no node of the graph (a change of layout).
        share: of the total time, 0 to 1.
        flop: floating-point operations, two for each multiply-add.
        bytes: the least traffic that the operands and the result need.
        least: milliseconds that the machine's rates allow for both; 0 where these are unknown.
        kernel: what ran, as the backend names it; that of the longest step if there were several.
    """

    name: str
    milliseconds: float
    share: float
    flop: int
    bytes: int
    op: str = ""
    kernel: str = ""
    precision: str = ""
    least: float = 0.0

    @property
    def roofline(self) -> float:
        """Share of the roofline, 0 to 1: `least` over the time it took."""
        return self.least / self.milliseconds if self.milliseconds > 0 else 0.0

    @property
    def gflop_per_s(self) -> float:
        return _rate(self.flop, self.milliseconds)

    @property
    def gb_per_s(self) -> float:
        return _rate(self.bytes, self.milliseconds)


@dataclass(frozen=True)
class Profile:
    """One run of an engine; `str()` shows its groups and nodes as tables.

    Args:
        rows: one per node that took time, longest first.
        groups: conv1, layer1 and so on, in the order of the network.
        total: all of it.
    """

    rows: tuple[Row, ...]
    groups: tuple[Row, ...]
    total: Row

    def to_dict(self) -> dict[str, Any]:
        def row(r: Row) -> dict[str, Any]:
            rates = {"gflop_per_s": r.gflop_per_s, "gb_per_s": r.gb_per_s, "roofline": r.roofline}
            return asdict(r) | rates

        return {
            "rows": [row(r) for r in self.rows],
            "groups": [row(r) for r in self.groups],
            "total": row(self.total),
        }

    def to_json(self) -> str:
        return json_text(self.to_dict())

    def __str__(self) -> str:
        groups = _table("group", (*self.groups, self.total))
        nodes = _table("node", self.rows, ("operation", "precision", "kernel"))
        return f"{render(groups)}\n{render(nodes, width=160)}"


@contextmanager
def traced(path: PathLike | None) -> Iterator[None]:
    """What runs within goes into a Chrome trace, by torch.profiler; nothing happens without a path.

    Raises:
        InputError: the file cannot be written.
    """
    if path is None:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    try:
        file = Path(path)
        file.open("ab").close()
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"trace={str(path)!r} cannot be written: {error}") from error
    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds, acc_events=True) as recorded:
        yield
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / file.name  # PyTorch puts a new file in the place of whatever is there
        recorded.export_chrome_trace(str(made))
        try:
            file.write_bytes(made.read_bytes())
        except OSError as error:
            raise InputError(f"trace={str(path)!r} cannot be written: {error}") from error


def make_profile(
    graph: Graph, shapes: Shapes, times: Sequence[NodeTime], precisions: Mapping[str, str]
) -> Profile:
    """Joins measured times with what each node had to do.

    Args:
        graph: the graph that ran.
        shapes: of every value in that run.
        times: in any order; several of one name are added up. A name that is no node of the graph
            keeps its time and counts no work.
        precisions: by node, such as "bf16"; a node that is missing is taken to run in the dtype
            of its result.
    """
    spent: dict[str, float] = {}
    least: dict[str, float] = {}
    longest: dict[str, NodeTime] = {}
    for time in times:
        spent[time.name] = spent.get(time.name, 0.0) + time.milliseconds
        least[time.name] = least.get(time.name, 0.0) + (time.least or 0.0)
        if time.name not in longest or time.milliseconds > longest[time.name].milliseconds:
            longest[time.name] = time
    whole = sum(spent.values())
    rows: dict[str, Row] = {}
    for name, milliseconds in spent.items():
        share, kernel = (milliseconds / whole if whole else 0.0), longest[name].ran_as
        if name not in graph:
            rows[name] = Row(name, milliseconds, share, 0, 0, kernel=kernel)
            continue
        node = graph[name]
        precision, ran = precisions.get(name, ""), longest[name]
        itemsize = _ITEMSIZE.get(precision, node.spec.torch_dtype.itemsize)
        rows[name] = Row(
            name,
            milliseconds,
            share,
            2 * multiply_adds(node, shapes, graph) if ran.flop is None else ran.flop,
            traffic(node, shapes, graph, itemsize) if ran.bytes is None else ran.bytes,
            op_name(node.op),
            kernel,
            precision,
            least[name],
        )
    in_order = [node.name for node in graph.nodes if node.name in rows]
    in_order += [name for name in rows if name not in graph]
    members: dict[str, list[Row]] = {}
    for name in in_order:
        members.setdefault(group_of(name) if name in graph else "other", []).append(rows[name])
    return Profile(
        tuple(sorted(rows.values(), key=lambda row: -row.milliseconds)),
        tuple(_sum(name, group) for name, group in members.items()),
        _sum("total", list(rows.values())),
    )


def group_of(name: str) -> str:
    """The stage a node belongs to (`layer1` of `layer1.0.conv1`), else its first module."""
    stage = _STAGE.match(name)
    return stage[0] if stage else name.split(".")[0]


def _sum(name: str, rows: Sequence[Row]) -> Row:
    return Row(
        name,
        sum(row.milliseconds for row in rows),
        sum(row.share for row in rows),
        sum(row.flop for row in rows),
        sum(row.bytes for row in rows),
        least=sum(row.least for row in rows),
    )


def _rate(amount: int, milliseconds: float) -> float:
    """10^9 a second; 0 where no time was measured."""
    return amount / milliseconds / 1e6 if milliseconds > 0 else 0.0


def _table(first: str, rows: Sequence[Row], texts: Sequence[str] = ()) -> Table:
    table = empty_table()
    table.add_column(first, no_wrap=True)
    known = any(row.least for row in rows)  # without a GPU the column would be empty
    for heading in ("ms", "share", "GFLOP/s", "GB/s", *(("roofline",) if known else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in texts:
        table.add_column(heading, no_wrap=True)
    for row in rows:
        numbers = (
            f"{row.milliseconds:.3f}",
            f"{row.share:.1%}",
            f"{row.gflop_per_s:.1f}",
            f"{row.gb_per_s:.2f}",
            *((f"{row.roofline:.0%}",) if known else ()),
        )
        words = {"operation": row.op, "precision": row.precision, "kernel": row.kernel}
        table.add_row(row.name, *numbers, *(words[heading] for heading in texts))
    return table
