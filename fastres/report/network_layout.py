"""Where each box of a network stands: blocks from the top down, branches side by side.

A block is what lies between two places where a single value holds everything: a residual block, or
a single node of a plain chain. Within one the longest path is the first column, and every other
path has a column of its own. It works for any graph without cycles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

from fastres.report.network_boxes import Box

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """How large boxes are, and how far apart; `header` is for the name of a block of several
    boxes, `lane` for a line that passes them."""

    width: float
    height: float
    gap: float
    margin: float
    header: float
    lane: float


@dataclass(frozen=True)
class Edge:
    """A line from box to box; `skips` those that pass every box of their block."""

    start: str
    end: str
    points: tuple[Point, ...]
    skips: bool


@dataclass(frozen=True)
class Block:
    """Boxes that are drawn together, within a frame if they are several.

    Args:
        paths: the boxes' names path by path, the main path first.
        places: the upper left corner of each box.
        top: where its input comes in, the lower end of the block before.
    """

    boxes: tuple[Box, ...]
    paths: tuple[tuple[str, ...], ...]
    places: Mapping[str, Point]
    edges: tuple[Edge, ...]
    top: float
    bottom: float
    right: float
    scale: Scale

    @property
    def name(self) -> str:
        """What the names have in common: layer1.0 of layer1.0.conv1 and layer1.0.conv2."""
        parts = [box.name.split(".") for box in self.boxes]
        common = takewhile(lambda own: len(set(own)) == 1, zip(*parts, strict=False))
        return (
            ".".join(own[0] for own in common) or f"{self.boxes[0].name} to {self.boxes[-1].name}"
        )

    @property
    def milliseconds(self) -> float:
        return sum(box.total.milliseconds for box in self.boxes)


def blocks_of(boxes: Sequence[Box]) -> list[list[Box]]:
    """Cuts the network wherever a single value is all that later boxes read of earlier ones."""
    last_use = {name: i for i, box in enumerate(boxes) for name in box.inputs}
    blocks: list[list[Box]] = [[]]
    alive: set[str] = set()
    for i, box in enumerate(boxes):
        blocks[-1].append(box)
        alive = {name for name in alive | {box.name} if last_use.get(name, -1) > i}
        if len(alive) == 1 and i + 1 < len(boxes):
            blocks.append([])
    return blocks


def place(boxes: Sequence[Box], top: float, scale: Scale) -> Block:
    """Lays out one block from a height on."""
    here = {box.name for box in boxes}
    reads = {box.name: [name for name in box.inputs if name in here] for box in boxes}
    depth: dict[str, int] = {}
    for box in boxes:
        depth[box.name] = 1 + max((depth[name] for name in reads[box.name]), default=-1)
    paths = _paths(boxes, reads, depth)
    column = {name: i for i, path in enumerate(paths) for name in path}
    first = top + scale.gap + (scale.header + scale.gap / 2 if len(boxes) > 1 else 0)
    across, down = scale.width + scale.gap, scale.height + scale.gap
    places = {
        name: (scale.margin + column[name] * across, first + depth[name] * down) for name in depth
    }
    right = scale.margin + len(paths) * across - scale.gap
    edges: list[Edge] = []
    for box in boxes:
        for name in box.inputs:
            edges.append(_edge(name, box.name, places, paths, (right, first), top, scale))
            right += scale.lane * edges[-1].skips
    bottom = first + (max(depth.values()) + 1) * down - scale.gap
    return Block(tuple(boxes), paths, places, tuple(edges), top, bottom, right, scale)


def _paths(
    boxes: Sequence[Box], reads: Mapping[str, Sequence[str]], depth: Mapping[str, int]
) -> tuple[tuple[str, ...], ...]:
    """The longest path to the last box, then the longest of what is left, and so on."""
    left = {box.name: None for box in boxes}  # an ordered set
    paths = []
    end = boxes[-1].name
    while True:
        path = [end]
        del left[end]
        while before := [name for name in reads[path[0]] if name in left]:
            path.insert(0, max(before, key=lambda name: depth[name]))
            del left[path[0]]
        paths.append(tuple(path))
        if not left:
            return tuple(paths)
        end = max(left, key=lambda name: depth[name])


def _edge(
    start: str,
    end: str,
    places: Mapping[str, Point],
    paths: Sequence[Sequence[str]],
    corner: Point,
    top: float,
    scale: Scale,
) -> Edge:
    """Along a column that is free between the two boxes; where there is none, past all boxes.

    Args:
        corner: how far to the right the block reaches, and where its first row of boxes begins.
        top: where what it reads of earlier blocks comes in.
    """
    right, first = corner
    middle = scale.width / 2
    x, y = places[end][0] + middle, places[end][1]
    above = y - scale.gap / 2
    if start in places:
        from_x, from_y = places[start][0] + middle, places[start][1] + scale.height
        fork = from_y + scale.gap / 2
    else:
        from_x, from_y, fork = scale.margin + middle, top, first - scale.gap / 2
    if (start, end) in {pair for path in paths for pair in pairwise(path)}:
        return Edge(start, end, ((from_x, from_y), (x, y)), False)
    if start in {path[-1] for path in paths}:  # its column is free from there on
        x += middle / 2
        return Edge(start, end, ((from_x, from_y), (from_x, above), (x, above), (x, y)), False)
    if end in {path[0] for path in paths}:  # its column is free up to there
        return Edge(start, end, ((from_x, from_y), (from_x, fork), (x, fork), (x, y)), False)
    lane, x = right + scale.lane, x + middle / 2
    around = ((from_x, from_y), (from_x, fork), (lane, fork), (lane, above), (x, above), (x, y))
    return Edge(start, end, around, True)
