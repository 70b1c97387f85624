"""A layer group of a network as SVG: boxes for nodes, lines for values, colour for time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from fastres.report.html import Html, join, shortened, tag
from fastres.report.network_boxes import Box
from fastres.report.network_layout import Block, Edge, Scale, place
from fastres.report.numbers import short

PAGE = Scale(width=272, height=106, gap=26, margin=16, header=22, lane=18)
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
        placed.append(place(boxes, top, PAGE))
        top = placed[-1].bottom
    width = max(block.right for block in placed) + 2 * PAGE.margin
    return tag(
        "div",
        tag(
            "svg",
            join(framed(block, spent(block), partial(_box, longest=longest)) for block in placed),
            class_="network",
            role="img",
            aria_label=" ".join(map(described, placed)),
            viewBox=f"0 0 {width:g} {top + PAGE.gap:g}",
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


def spent(block: Block) -> str:
    """The time of all its boxes."""
    return short(block.milliseconds, "ms")


def framed(block: Block, time: str, draw: Callable[[Box, float, float], Html]) -> Html:
    """A block with its lines; within a frame that has its name and time if it has several boxes.

    Args:
        draw: gives a box at its upper left corner.
    """
    boxes = {box.name: box for box in block.boxes}
    scale, parts = block.scale, list[Html]()
    if len(block.boxes) > 1:
        parts.append(
            tag(
                "rect",
                class_="frame",
                x="1",
                y=f"{block.top + scale.gap:g}",
                width=f"{block.right + scale.margin:g}",
                height=f"{block.bottom - block.top - scale.gap / 2:g}",
                rx="8",
            )
        )
    parts += [_edge(edge, boxes[edge.end], scale.gap / 2) for edge in block.edges]
    if len(block.boxes) > 1:  # over the lines
        beside, y = scale.margin + scale.width / 2, block.top + scale.gap + 17
        parts.append(words(block.name, scale.margin, y, "over"))
        parts.append(words(time, beside + 8, y, "over"))  # right of the line that comes in
    parts += [draw(box, *block.places[box.name]) for box in block.boxes]
    return join(parts)


def _edge(edge: Edge, end: Box, above: float) -> Html:
    """A line with its tip, and a sum so far above it where it is added."""
    x, y = edge.points[-1]
    line = " ".join(f"{a:g},{b:g}" for a, b in edge.points)
    beside = len(edge.points) > 2
    tip = f"M {x - 4:g} {y - 6:g} L {x:g} {y:g} L {x + 4:g} {y - 6:g}"
    parts = [
        tag("polyline", class_="edge skip" if edge.skips else "edge", points=line),
        tag("path", class_="edge", d=tip),
    ]
    if beside and end.adds:
        radius = f"{min(8, above):g}"
        parts.append(tag("circle", class_="sum", cx=f"{x:g}", cy=f"{y - above:g}", r=radius))
        parts.append(words("+", x, y - above + 5, anchor="middle"))
    return join(parts)


def shell(box: Box, x: float, y: float, scale: Scale, longest: float) -> Html:
    """An empty box: the more time, the more colour, and the longer the bar at its foot.

    Args:
        longest: see `drawing`.
    """
    share = box.total.milliseconds / longest if longest else 0.0
    fill = f"fill: color-mix(in srgb, var(--heat) {_HEAT * share:.0f}%, var(--raised))"
    frame = "box apart" if box.note else "box"
    place = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{scale.width:g}"}
    parts = [
        tag("title", "\n".join(_lines(box))),
        tag("rect", class_=frame, height=f"{scale.height:g}", rx="6", style=fill, **place),
    ]
    if box.rows:
        where = {"y": f"{y + scale.height - 4:g}", "width": f"{scale.width * share:.1f}"}
        parts.append(tag("rect", class_="bar", height="4", rx="2", **{**place, **where}))
    return join(parts)


def _box(box: Box, x: float, y: float, longest: float) -> Html:
    parts = [shell(box, x, y, PAGE, longest)]
    if box.rows:
        time = f"{short(box.total.milliseconds, 'ms')} · {100 * box.total.share:.1f} %"
        parts.append(words(time, x + PAGE.width - 10, y + 18, anchor="end"))
    parts.append(words(shortened(box.name.split(".", 2)[-1], _NAME), x + 10, y + 18, "name"))
    for i, line in enumerate(list(_lines(box))[1:], 1):
        parts.append(words(shortened(line, _LETTERS), x + 10, y + 18 + i * _LINE))
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


def words(
    said: str, x: float, y: float, style: str | None = None, anchor: str | None = None
) -> Html:
    """A line of text at a place."""
    place = {"x": f"{x:g}", "y": f"{y:g}"}
    return tag("text", said, class_=style, text_anchor=anchor, **place)
