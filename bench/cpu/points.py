"""What rounding costs in Winograd's convolutions, by points of interpolation and length of chains.

python -m bench.cpu.points [--images 2] [-o points.json]

Each convolution is computed in fp32 with the order of operations of kernels/cpu, one rounding a
step, and compared with float64: the root mean square of the error over that of the result, in units
of PyTorch's own error. The inputs are normal and through a ReLU, the weights drawn as He's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from bench.documents import check_output, headed
from fastres.text import render

Map = list[list[Fraction]]
SIZES = ((64, 56), (128, 28), (256, 14), (512, 14))  # channels, and pixels of a side
OUTPUTS = 64
PART = 64  # channels of a chain, while points are compared
CHOSEN = "F(4): 0, ±5/8, ±3/2"
POINTS = {  # the finite ones; infinity is always the last
    "F(2): 0, ±1": "0 1 -1",
    "F(4): 0, ±1, ±2": "0 1 -1 2 -2",
    "F(4): 0, ±1, ±1/2": "0 1 -1 1/2 -1/2",
    "F(4): 0, ±1/2, ±3/2": "0 1/2 -1/2 3/2 -3/2",
    CHOSEN: "0 5/8 -5/8 3/2 -3/2",
    "F(4): 0, ±3/4, ±3/2": "0 3/4 -3/4 3/2 -3/2",
    "F(4): 0, ±3/4, ±4/3": "0 3/4 -3/4 4/3 -4/3",
    "F(6): 0, ±1, ±2, ±1/2": "0 1 -1 2 -2 1/2 -1/2",
}
PARTS = (16, 32, 64, 128, 512)


class Maps(NamedTuple):
    """y = output [(filter g filter^T) * (input d input^T)] output^T."""

    input: Map
    filter: Map
    output: Map


def maps(points: Sequence[Fraction]) -> Maps:
    """Of F(m x m, 3 x 3) with m + 1 finite points, exactly; kernels/cpu/transforms.h has them."""
    count, size = len(points), len(points) - 1
    rows, filters = [], []
    for i, p in enumerate(points):
        others = [*points[:i], *points[i + 1 :]]
        scale = Fraction(1)
        for other in others:
            scale *= p - other
        rows.append([*_roots(others), Fraction(0)])
        filters.append([p**k / scale for k in range(3)])
    rows.append(_roots(points))
    filters.append([Fraction(0), Fraction(0), Fraction(1)])
    outputs = [[p**k for p in points] + [Fraction(k == size - 1)] for k in range(size)]
    assert all(len(row) == count + 1 for row in (*rows, *outputs))
    return Maps(rows, filters, outputs)


def _roots(points: Sequence[Fraction]) -> list[Fraction]:
    """The coefficients of the product of (x - p), the lowest power first."""
    found = [Fraction(1)]
    for p in points:
        shifted, scaled = [Fraction(0), *found], [p * c for c in found] + [Fraction(0)]
        found = [a - b for a, b in zip(shifted, scaled, strict=True)]
    return found


def convolved(x: Tensor, weight: Tensor, points: Sequence[Fraction], part: int) -> Tensor:
    """x [N, C, H, W] with weight [K, C, 3, 3], stride 1, padding 1, as the kernels compute it.

    Args:
        part: channels that are added up in one chain.
    """
    made, size = maps(points), len(points) - 1
    images, channels, height, width = x.shape
    down, across = -(-height // size), -(-width // size)
    padded = F.pad(x, (1, size * across - width + 1, 1, size * down - height + 1))
    tiles = padded.unfold(2, size + 2, size).unfold(3, size + 2, size)  # [N, C, y, x, n, n]
    values = _along(made.input, _along(made.input, tiles, 4), 5)
    values = values.permute(4, 5, 1, 0, 2, 3).flatten(3).flatten(0, 1)  # [n n, C, tiles]
    exact = torch.tensor([[float(c) for c in row] for row in made.filter], dtype=torch.float64)
    u = torch.einsum("ia,kcab,jb->ijkc", exact, weight.double(), exact).flatten(0, 1).float()
    sums = torch.zeros(u.shape[0], u.shape[1], values.shape[2])
    for first in range(0, channels, part):
        chain = torch.zeros_like(sums)
        for c in range(first, min(first + part, channels)):
            chain += u[:, :, c, None] * values[:, c, None, :]
        sums += chain
    n = size + 2
    sums = sums.view(n, n, len(weight), images, down, across)
    y = _along(made.output, _along(made.output, sums, 0), 1)  # [m, m, K, N, y, x]
    y = y.permute(3, 2, 4, 0, 5, 1).reshape(images, len(weight), size * down, size * across)
    return y[:, :, :height, :width]


def _along(rows: Map, x: Tensor, dim: int) -> Tensor:
    """A small matrix times one dimension, in fp32, term by term."""
    parts = x.unbind(dim)
    found = []
    for row in rows:
        terms = [float(c) * part for c, part in zip(row, parts, strict=True) if c]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        found.append(total)
    return torch.stack(found, dim)


def error(y: Tensor, exact: Tensor) -> float:
    return float((y - exact).norm() / exact.norm())


def measure(images: int, pixels: int | None = None) -> list[dict[str, object]]:
    """A row for each size, set of points and length of a chain."""
    rows: list[dict[str, object]] = []
    for channels, side in SIZES:
        draw = torch.Generator().manual_seed(channels)
        x = torch.randn(images, channels, *2 * [pixels or side], generator=draw).relu()
        weight = torch.randn(OUTPUTS, channels, 3, 3, generator=draw) * (2 / (9 * channels)) ** 0.5
        exact = F.conv2d(x.double(), weight.double(), padding=1)
        own = error(F.conv2d(x, weight, padding=1), exact)
        for name, text in POINTS.items():
            for part in PARTS if name == CHOSEN else (PART,):
                points = [Fraction(word) for word in text.split()]
                found = error(convolved(x, weight, points, part), exact)
                rows.append(
                    {
                        "points": name,
                        "channels": channels,
                        "part": part,
                        "error": found,
                        "torch": own,
                        "times": found / own,
                    }
                )
    return rows


def _table(title: str, heading: str, key: str, rows: Sequence[dict[str, object]]) -> Table:
    table = Table(title=title)
    table.add_column(heading)
    for channels, _ in SIZES:
        table.add_column(f"{channels} channels", justify="right")
    for name in dict.fromkeys(row[key] for row in rows):
        of = {row["channels"]: row["times"] for row in rows if row[key] == name}
        table.add_row(str(name), *(f"{of[channels]:.2f}" for channels, _ in SIZES))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.points", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--images", type=int, default=2, help="of each convolution (default: 2)")
    parser.add_argument("-o", "--output", type=Path, help="also write the figures as JSON")
    given = parser.parse_args(arguments)
    if given.images < 1:
        parser.error(f"--images is at least 1, got {given.images}")
    check_output(parser, given.output)

    begun = time.time()
    rows = measure(given.images)
    by_points = [row for row in rows if row["part"] == PART]
    title = f"error over PyTorch's, chains of {PART} channels"
    print(render(_table(title, "points, and infinity", "points", by_points)))
    by_part = [row for row in rows if row["points"] == CHOSEN]
    print(render(_table(f"error over PyTorch's, {CHOSEN}", "channels of a chain", "part", by_part)))
    if given.output is not None:
        found = {**headed("points", begun), "rows": rows}
        given.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
