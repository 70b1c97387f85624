"""The page of one network: what the engine made of it, and where the time of a run goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

import msgspec
import torch

from fastres.engine.engine import Engine
from fastres.engine.info import EngineInfo
from fastres.engine.profile import Profile
from fastres.graph.cost import Shapes
from fastres.graph.ir import Graph
from fastres.graph.shapes import infer_shapes
from fastres.report import records
from fastres.report.html import Cell, Column, Html, folded, items, join, table, tag
from fastres.report.network_boxes import INPUT, Box, boxes_of, captured_and_run
from fastres.report.network_drawing import drawing
from fastres.report.network_layout import blocks_of
from fastres.report.network_overview import overview
from fastres.report.numbers import number, short
from fastres.report.page import page
from fastres.report.provenance import machine_table
from fastres.report.timing import timing_table
from fastres.timing.machine import machine

_LEAD = (
    "From the top down, one box for each node that runs: the operation and its shapes without the "
    "batch, what was fused into it, the precision and the kernel. The more colour, the more time. "
    "A blue line carries the input of a block past its boxes; + marks where it is added. A dashed "
    "box has a note."
)


def network_page(
    name: str, engine: Engine, inputs: Sequence[torch.Tensor], profile: Profile
) -> Html:
    """Draws an engine's network.

    Args:
        name: of the model.
        inputs: what the engine was profiled with.
        profile: what it found.
    """
    shapes = _shapes(engine, inputs)
    here = msgspec.convert(asdict(machine()), records.Machine)
    return draw(name, engine.graph, engine.source, engine.info, profile, shapes, here)


def network_picture(
    name: str, engine: Engine, inputs: Sequence[torch.Tensor], profile: Profile
) -> Html:
    """The whole network as one SVG element; see `network_page`."""
    shapes = _shapes(engine, inputs)
    return overview(name, boxes_of(engine.graph, engine.source, engine.info, profile, shapes))


def _shapes(engine: Engine, inputs: Sequence[torch.Tensor]) -> Shapes:
    planar = engine.planar(tuple(inputs))
    return infer_shapes(engine.graph, [tuple(x.shape) for x in planar])


def draw(
    name: str,
    graph: Graph,
    source: Graph,
    info: EngineInfo,
    profile: Profile,
    shapes: Shapes,
    where: records.Machine,
) -> Html:
    """The same of the parts of an engine: its graph as it runs and as captured, and so on."""
    boxes = boxes_of(graph, source, info, profile, shapes)
    size = shapes[graph.inputs[0].name][0]
    ran = ", ".join(info.precisions)
    spent = profile.total.milliseconds
    rate = f", {1e3 * size / spent:,.1f} img/s" if spent else ""
    groups = [(row, ()) for row in (*profile.groups, profile.total)]
    parts = [
        ("What the engine did", _account(graph, source, info)),
        ("Layer groups", timing_table("In the order of the network", "group", groups)),
        ("The network", join([tag("p", _LEAD, class_="lead"), _groups(boxes)])),
        ("Every node", _nodes(boxes, profile)),
        ("Machine and versions", machine_table({"this run": where})),
    ]
    about = f"{info.backend} in {ran}, batch {size}: {short(spent, 'ms')} in all nodes{rate}"
    return page(name, about, parts)


def _groups(boxes: Sequence[Box]) -> Html:
    """Each layer group behind a fold of its own."""
    longest = max((box.total.milliseconds for box in boxes), default=0.0)
    parts = []
    for _, together in groupby(blocks_of(boxes), key=lambda block: block[-1].group):
        blocks = list(together)
        members = [box for block in blocks for box in block]
        spent = sum(box.total.milliseconds for box in members)
        share = sum(box.total.share for box in members)
        names = ", ".join(dict.fromkeys(box.group for box in members))
        taken = f" {short(spent, 'ms')}, {100 * share:.1f} %" if spent else ""
        aside = tag("span", taken, class_="aside")
        parts.append(folded(join([names, aside]), drawing(blocks, longest), unfolded=True))
    return join(parts)


def _account(graph: Graph, source: Graph, info: EngineInfo) -> Html:
    """Counts of operations, and what the backend says of itself."""
    counts = captured_and_run(graph, source)
    columns = [Column("operation"), Column("captured", True), Column("run by themselves", True)]
    rows: list[Sequence[Cell]] = [
        (name, number(captured), number(run)) for name, (captured, run) in counts.items()
    ]
    whole = [
        f"{choice.taken}: {choice.microseconds:.1f} us; "
        + "; ".join(f"{form}: {why}" for form, why in choice.others.items())
        for choice in info.account.choices
        if not choice.nodes
    ]
    fallbacks = [f"{node.name} runs in PyTorch: {node.reason}" for node in info.fallbacks]
    passed = [f"passed over: {reason}" for reason in info.passed_over]
    return join(
        [
            tag("p", f"{len(source.nodes)} captured operations became {len(graph.nodes)} nodes."),
            table("Operations as captured, and those that run by themselves", columns, rows),
            items([*whole, *fallbacks, *info.account.notes, *passed]),
        ]
    )


def _nodes(boxes: Sequence[Box], profile: Profile) -> Html:
    """All boxes in the order of the network, then the steps that are no node."""
    headings = ("operation", "shapes", "fused", "precision", "ran as")
    rows = [
        (
            box.total,
            (box.what, box.shapes, " + ".join(box.fused), box.precision, box.ran_as or box.note),
        )
        for box in boxes
        if box.what != INPUT
    ]
    shown = {row.name for box in boxes for row in box.rows}
    steps = [row for row in profile.rows if row.name not in shown]
    rows += [(row, ("", "", "", "", row.kernel)) for row in steps]
    return timing_table("Every node, and steps that are no node", "node", rows, headings)
