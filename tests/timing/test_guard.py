"""The regression guard: planted slowdowns are caught, equal runs are not, bad files are named."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fastres.errors import InputError
from fastres.text import json_text
from fastres.timing.guard import Base, Comparison, compare, read_base
from fastres.timing.report import Measurement, measurement

LANES = {"ours": ("eager", "openvino")}
TIMES = {"ours": 10.0, "eager": 20.0, "openvino": 9.9}


def run(seed: int, factor: float = 1.0, machine: float = 1.0) -> list[Measurement]:
    """A noisy run of three launches: `factor` slows ours down, `machine` everything.

    Eager differs by 6 % from launch to launch, the others by half a percent.
    """
    draw = np.random.default_rng(seed)
    found = []
    together = np.exp(draw.normal(0, 0.1, (3, 7, 1)))  # disturbs a whole round
    for name, ms in TIMES.items():
        slow = factor if name == "ours" else 1.0
        launch = np.exp(draw.normal(0, 0.06 if name == "eager" else 0.005, (3, 1, 1)))
        own = np.exp(draw.normal(0, 0.01, (3, 7, 5)))
        seconds = 1e-3 * ms * slow * machine * together * launch * own
        found.append(measurement(name, "fp32", 1, seconds.tolist(), (50,), "net"))
    return found


def base(measured: list[Measurement]) -> Base:
    document = {"command": "bench", "schema": 1, "lanes": LANES, "measurements": measured}
    return msgspec.json.decode(json_text(document).encode(), type=Base)


def judged(now: list[Measurement], then: list[Measurement]) -> Comparison:
    return compare(now, LANES, base(then), "base.json", 0.05)


def test_a_planted_slowdown_is_caught() -> None:
    for seed in range(20):
        (row,) = judged(run(seed, factor=1.1), run(100 + seed)).rows
        assert row.verdict == "slower" and row.change.median == pytest.approx(1 / 1.1, rel=0.02)
        assert row.yardstick == "openvino"  # the steadier


def test_equal_runs_are_not_flagged_though_the_machine_is_slower() -> None:
    for seed in range(20):
        found = judged(run(seed, machine=1.5), run(100 + seed))
        assert found.slower == () and found.rows[0].change.median == pytest.approx(1, rel=0.02)


def test_faster_and_unclear() -> None:
    assert judged(run(0, factor=0.8), run(1)).rows[0].verdict == "faster"
    assert judged(run(0, factor=1.05), run(1)).rows[0].verdict == "unclear"
    assert judged(run(0), run(1)).rows[0].verdict == "same"


def test_one_launch_is_judged_by_its_rounds() -> None:
    now, then = ([replace(m, launches=()) for m in run(seed)] for seed in (0, 1))
    assert judged(now, then).rows[0].verdict == "same"


def test_a_peer_of_one_run_only_is_no_yardstick() -> None:
    found = judged(run(0)[:2], run(1))
    assert found.rows[0].yardstick == "eager" and found.slower == ()
    assert "speed now over speed in base.json" in str(found) and "eager" in str(found)
    with pytest.raises(InputError, match="share no peer"):
        judged(run(0)[:1], run(1))


def test_runs_without_anything_in_common() -> None:
    other = [replace(m, batch_size=8) for m in run(0)]
    with pytest.raises(InputError, match="base.json timed ours; none of that is in this run"):
        judged(other, run(1))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "holds no results of fastres bench"),
        ("[1, 2]", "holds no results of fastres bench"),
        ('{"command": "bench"}', "holds no results of fastres bench"),
        ('{"command": "verify", "schema": 1, "lanes": {}, "measurements": []}', "'verify'"),
        ('{"command": "bench", "schema": 2, "lanes": {}, "measurements": []}', "schema 2"),
    ],
)
def test_bad_files(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_base(path)
