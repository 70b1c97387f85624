"""v1 beside v1.5: ratios from planted times, and where the difference is."""

from typing import Any

import pytest

from fastres.timing.rates import Rates
from fastres.timing.report import Measurement, measurement
from fastres.timing.versions import table, versions


def timed(ms: float) -> Measurement:
    return measurement("x", "bf16", 8, [[[ms / 1e3]] * 10], (50,))


def profile(**groups: tuple[float, int, int]) -> dict[str, Any]:
    rows = [
        {"name": name, "milliseconds": ms, "flop": flop, "bytes": traffic}
        for name, (ms, flop, traffic) in groups.items()
    ]
    total = {key: sum(row[key] for row in rows) for key in ("flop", "milliseconds")}
    return {"groups": rows, "rows": rows, "total": total}


V1 = profile(layer1=(2.0, 10_000, 100), layer2=(2.0, 10_000, 100))
V15 = profile(layer1=(2.0, 10_000, 100), layer2=(3.0, 12_000, 1_000))


NOISE = (-0.05, 0.0, 0.1)


def test_ratios() -> None:
    # 1 flop and 1 byte take a nanosecond: layer2 of v1.5 is bound by its arithmetic
    found = versions("resnet50", (timed(4.0), [V1]), (timed(5.0), [V15]), Rates(1.0, 0.01))
    assert found.ratio.median == pytest.approx(0.8)
    assert found.macs_ratio == pytest.approx(1.1)
    # least: 10,000 + 10,000 against 10,000 + max(12,000, 100,000)
    assert found.roofline_ratio == pytest.approx(5.5)
    assert (found.v1_img_s, found.v15_img_s) == pytest.approx((2000, 1600))
    second = found.groups[1]
    assert (second.group, second.v1_ms, second.v15_ms) == ("layer2", 2.0, 3.0)
    assert (second.v1_macs, second.v15_macs) == (5_000, 6_000)


def test_the_table_says_where() -> None:
    """Only where all turns agree: layer1 is now faster, now slower."""
    old = [profile(layer1=(2.0 + d, 10_000, 100), layer2=(2.0 + d, 10_000, 100)) for d in NOISE]
    new = [profile(layer1=(2.0, 10_000, 100), layer2=(3.0 - d, 12_000, 900)) for d in NOISE]
    found = versions("resnet50", (timed(4.0), old), (timed(5.0), new), None)
    text = table([found])
    assert found.roofline_ratio is None
    assert "layer2 +1 [0.8, 1.1] ms" in text and "layer1" not in text
    assert "0.8x [0.8, 0.8]" in text and "1.100" in text
    first = found.groups[0]
    assert (first.v1_ms, first.v15_ms) == (2.0, 2.0) and not first.difference.matters(4.0)


def test_one_turn_shows_nothing() -> None:
    found = versions("resnet50", (timed(4.0), [V1]), (timed(5.0), [V15]), None)
    assert "in no stage for certain" in table([found])


def test_rates_are_a_roof() -> None:
    assert Rates(100.0, 10.0).least_seconds(1e9, 1e6) == pytest.approx(1e-2)
    assert Rates(100.0, 10.0).least_seconds(1e6, 1e9) == pytest.approx(1e-1)
