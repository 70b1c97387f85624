"""A layer group of a network as SVG: boxes for nodes, lines for values, colour for time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastres.report.html import Html, join, shortened, tag
from fastres.report.network_boxes import Box
from fastres.report.network_layout import (
    GAP,
    HEIGHT,
    MARGIN,
    WIDTH,
    Block,
    Edge,
    place,
)
from fastres.report.numbers import short

_HEAT = 45  # percent of the colour, in the box that takes longest: text stays readable on it
_LINE = 16.0
_LETTERS, _NAME = 37, 16  # of a line in a box, and of a name beside its time


def drawing(blocks: Sequence[Sequence[Box]], longest: float) -> Html:
    """One layer group, from the top down.

    Args:
        longest: milliseconds of the slowest box of the network, which the colours are scaled by.
    """
    placed: list[Block] = []
    top = 0.0
    for boxes in blocks:
        placed.append(place(boxes, top))
        top = placed[-1].bottom
    width = max(block.right for block in placed) + 2 * MARGIN
    return tag(
        "div",
        tag(
            "svg",
            join(_block(block, longest) for block in placed),
            class_="network",
            role="img",
            aria_label=" ".join(map(described, placed)),
            viewBox=f"0 0 {width:g} {top + GAP:g}",
            style=f"min-width: {0.9 * width:.0f}px; max-width: {width:.0f}px",
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=f"Drawing of {placed[0].name} to {placed[-1].name}",
    )


def described(block: Block) -> str:
    """The block in words."""
    boxes = {box.name: box for box in block.boxes}
    main, *others = (
        " → ".join(f"{name} ({boxes[name].what}{_spent(boxes[name])})" for name in path)
        for path in block.paths
    )
    beside = "".join(f"; beside it {path}" for path in others)
    past = "".join(
        f"; {edge.start} {'is added to' if boxes[edge.end].adds else 'goes also to'} {edge.end}"
        for edge in block.edges
        if edge.skips
    )
    return f"{main}{beside}{past}."


def _spent(box: Box) -> str:
    return f", {short(box.total.milliseconds, 'ms')}" if box.rows else ""


def _block(block: Block, longest: float) -> Html:
    boxes = {box.name: box for box in block.boxes}
    parts: list[Html] = []
    if len(block.boxes) > 1:
        parts.append(
            tag(
                "rect",
                class_="frame",
                x="1",
                y=f"{block.top + GAP:g}",
                width=f"{block.right + MARGIN:g}",
                height=f"{block.bottom - block.top - GAP / 2:g}",
                rx="8",
            )
        )
    parts += [_edge(edge, boxes[edge.end]) for edge in block.edges]
    if len(block.boxes) > 1:  # over the lines
        title = f"{block.name} · {short(block.milliseconds, 'ms')}"
        parts.append(_words(title, MARGIN, block.top + GAP + 17, "over"))
    parts += [_box(box, *block.places[box.name], longest) for box in block.boxes]
    return join(parts)


def _edge(edge: Edge, end: Box) -> Html:
    x, y = edge.points[-1]
    line = " ".join(f"{a:g},{b:g}" for a, b in edge.points)
    beside = len(edge.points) > 2
    tip = f"M {x - 4:g} {y - 6:g} L {x:g} {y:g} L {x + 4:g} {y - 6:g}"
    parts = [
        tag("polyline", class_="edge skip" if edge.skips else "edge", points=line),
        tag("path", class_="edge", d=tip),
    ]
    if beside and end.adds:
        parts.append(tag("circle", class_="sum", cx=f"{x:g}", cy=f"{y - GAP / 2:g}", r="8"))
        parts.append(_words("+", x, y - GAP / 2 + 5, anchor="middle"))
    return join(parts)


def _box(box: Box, x: float, y: float, longest: float) -> Html:
    heat = _HEAT * box.total.milliseconds / longest if longest else 0
    fill = f"fill: color-mix(in srgb, var(--heat) {heat:.0f}%, var(--raised))"
    frame = "box apart" if box.note else "box"
    place = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{WIDTH:g}"}
    parts = [
        tag("title", "\n".join(_lines(box))),
        tag("rect", class_=frame, height=f"{HEIGHT:g}", rx="6", style=fill, **place),
    ]
    if box.rows:
        bar = f"{WIDTH * box.total.milliseconds / longest if longest else 0:.1f}"
        where = {**place, "y": f"{y + HEIGHT - 4:g}", "width": bar}
        parts.append(tag("rect", class_="bar", height="4", rx="2", **where))
        time = f"{short(box.total.milliseconds, 'ms')} · {100 * box.total.share:.1f} %"
        parts.append(_words(time, x + WIDTH - 10, y + 18, anchor="end"))
    parts.append(_words(shortened(box.name.split(".", 2)[-1], _NAME), x + 10, y + 18, "name"))
    for i, line in enumerate(list(_lines(box))[1:], 1):
        parts.append(_words(shortened(line, _LETTERS), x + 10, y + 18 + i * _LINE))
    return tag("g", join(parts))


def _lines(box: Box) -> Iterator[str]:
    yield f"{box.name}{_spent(box)}"
    yield box.what
    yield box.shapes
    if box.fused:
        yield f"+ {' + '.join(box.fused)}"
    if box.precision or box.ran_as:
        yield " · ".join(filter(None, (box.precision, box.ran_as)))
    if box.note:
        yield box.note


def _words(
    words: str, x: float, y: float, style: str | None = None, anchor: str | None = None
) -> Html:
    place = {"x": f"{x:g}", "y": f"{y:g}"}
    return tag("text", words, class_=style, text_anchor=anchor, **place)
