"""A whole network as one small picture: every layer group, blocks that repeat drawn once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

from fastres.report.html import Html, join, shortened, tag
from fastres.report.network_boxes import Box
from fastres.report.network_drawing import described, framed, shell, spent, words
from fastres.report.network_layout import Block, Scale, blocks_of, place
from fastres.report.numbers import short

Repeated = tuple[Sequence[Box], int]  # a block, and how many like it follow each other
_SCALE = Scale(width=166, height=60, gap=18, margin=10, header=23, lane=12)
_WIDTH = 990.0  # beyond which the next groups go below
_APART, _HEAD, _LETTERS = 14.0, 16.0, 24
_BRIEFLY = {"BatchNorm": "BN", "residual add": "add", "quantise to int8": "int8"}


def overview(name: str, boxes: Sequence[Box]) -> Html:
    """Layer groups in the order of the network, from left to right and row by row.

    Args:
        name: of the model.
        boxes: see `boxes_of`.
    """
    columns = [_column(blocks) for blocks in _groups(_folded(blocks_of(boxes)))]
    longest = max(box.total.milliseconds for c in columns for block, _ in c for box in block.boxes)
    draw = partial(_box, longest=longest)
    parts, x, y, low, right = list[Html](), 0.0, _HEAD + _APART, 0.0, 0.0
    for column in columns:
        width = max(block.right for block, _ in column) + 2 * _SCALE.margin
        if x and x + width > _WIDTH:
            x, y = 0.0, low + _APART
        drawn = (framed(block, _time(block, times), draw) for block, times in column)
        parts.append(tag("g", join(drawn), transform=f"translate({x + _APART:g} {y:g})"))
        x += width + _APART
        low, right = max(low, y + column[-1][0].bottom), max(right, x + _APART)
    told = " ".join(described(block) for column in columns for block, _ in column)
    whole = sum(box.total.milliseconds for box in boxes)
    head = f"{name}: {short(whole, 'ms')} in {sum(bool(box.rows) for box in boxes)} nodes"
    parts.append(words(head, _APART, _HEAD + 4, "name"))
    return tag(
        "svg",
        join(parts),
        class_="network",
        role="img",
        aria_label=f"{head}. {told}",
        viewBox=f"0 0 {right:g} {low + _APART:g}",
    )


def _groups(blocks: Iterable[Repeated]) -> Iterator[list[Repeated]]:
    """What stands in one column: a layer group, or single boxes that follow each other."""
    for _, together in groupby(blocks, key=lambda pair: len(pair[0]) > 1 and pair[0][-1].group):
        yield list(together)


def _column(blocks: Iterable[Repeated]) -> list[tuple[Block, int]]:
    placed: list[tuple[Block, int]] = []
    for boxes, times in blocks:
        top = placed[-1][0].bottom if placed else 0.0
        placed.append((place(boxes, top, _SCALE), times))
    return placed


def _folded(blocks: Iterable[Sequence[Box]]) -> Iterator[Repeated]:
    """Blocks that follow each other and do the same as one, whose boxes have the time of all."""
    for _, together in groupby(blocks, key=_kind):
        alike = list(together)
        same = zip(*alike, strict=True)
        yield [replace(b[0], rows=sum((box.rows for box in b), ())) for b in same], len(alike)


def _kind(block: Sequence[Box]) -> tuple[object, ...]:
    return tuple((b.group, b.what, b.shapes, b.fused, b.precision, b.note) for b in block)


def _time(block: Block, times: int) -> str:
    return f"×{times}: {spent(block)}" if times > 1 else spent(block)


def _box(box: Box, x: float, y: float, longest: float) -> Html:
    parts = [shell(box, x, y, _SCALE, longest)]
    fused = " + ".join(_BRIEFLY.get(what, what) for what in box.fused)
    for i, line in enumerate((box.what, box.shapes.rpartition(" ")[2], fused and f"+ {fused}")):
        style = "name" if i == 0 else None
        parts.append(words(shortened(line, _LETTERS), x + 8, y + 17 + 15 * i, style))
    if box.rows:
        time = short(box.total.milliseconds, "ms")
        parts.append(words(time, x + _SCALE.width - 8, y + 32, anchor="end"))
    return tag("g", join(parts))
