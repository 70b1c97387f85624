"""python -m bench.cpu.points: exact maps, and figures that tell points apart."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench.cpu import points

FINITE = {name: [Fraction(word) for word in text.split()] for name, text in points.POINTS.items()}


@pytest.mark.parametrize("name", FINITE)
def test_the_maps_are_a_convolution(name: str) -> None:
    """In fractions, so with no error at all."""
    made, size = points.maps(FINITE[name]), len(FINITE[name]) - 1
    draw = random.Random(0)
    d = [Fraction(draw.randrange(-9, 10)) for _ in range(size + 2)]
    g = [Fraction(draw.randrange(-9, 10)) for _ in range(3)]

    def times(rows: points.Map, x: list[Fraction]) -> list[Fraction]:
        return [sum((a * b for a, b in zip(row, x, strict=True)), Fraction(0)) for row in rows]

    products = [a * b for a, b in zip(times(made.filter, g), times(made.input, d), strict=True)]
    assert times(made.output, products) == [
        sum((d[i + k] * g[k] for k in range(3)), Fraction(0)) for i in range(size)
    ]


@pytest.mark.parametrize("name", FINITE)
def test_convolved(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 5, 7, 9, generator=draw), torch.randn(4, 5, 3, 3, generator=draw)
    y = points.convolved(x, weight, FINITE[name], 2)
    want = F.conv2d(x.double(), weight.double(), padding=1)
    # of 20 draws the largest: 1.7e-4 of F(6), 6.6e-5 of the others
    assert float((y - want).abs().max()) < (3e-4 if name.startswith("F(6)") else 1e-4)


def test_what_the_kernels_took_is_the_best() -> None:
    rows = {(r["points"], r["part"]): r for r in points.measure(1, 8) if r["channels"] == 256}
    chosen = {part: float(str(rows[points.CHOSEN, part]["times"])) for part in points.PARTS}
    others = [
        float(str(row["times"]))
        for (name, part), row in rows.items()
        if name.startswith("F(4)") and name != points.CHOSEN and part == points.PART
    ]
    assert chosen[64] < min(others)
    assert chosen[64] < 0.75 * chosen[512]


def test_what_it_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(points, "SIZES", ((16, 8),))
    assert points.main(["--images", "1", "-o", str(tmp_path / "points.json")]) == 0
    assert "0, ±5/8, ±3/2" in capsys.readouterr().out
    found = json.loads((tmp_path / "points.json").read_text())
    assert len(found["rows"]) == len(points.POINTS) + len(points.PARTS) - 1
    with pytest.raises(SystemExit, match="2"):
        points.main(["--images", "0"])
    assert "at least 1, got 0" in capsys.readouterr().err
