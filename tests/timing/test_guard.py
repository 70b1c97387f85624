"""The regression guard: planted slowdowns are caught, equal runs are not, bad files are named."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fastres.errors import InputError
from fastres.text import json_text
from fastres.timing.guard import (
    Base,
    Comparison,
    Conditions,
    check_conditions,
    compare,
    read_base,
)
from fastres.timing.machine import Machine
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


HERE = Machine("Abacus 1", 2, 2, None, {"openvino": "1"})
CONDITIONS = Conditions(True, "not included", (3, 224, 224))


def document(measured: list[Measurement], **changed: Any) -> dict[str, Any]:
    run = {"finished": True, "transfers": "not included", "input": [3, 224, 224]}
    head = {"command": "bench", "schema": 1, "lanes": LANES, "run": run}
    return {**head, "machine": asdict(HERE), "measurements": measured, **changed}


def base(measured: list[Measurement], **changed: Any) -> Base:
    return msgspec.json.decode(json_text(document(measured, **changed)).encode(), type=Base)


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


def test_a_base_with_launches_or_targets_that_do_not_agree(tmp_path: Path) -> None:
    first, *rest = run(1)
    other = replace(first, target="other", launches=(8, 6, 7))
    path = tmp_path / "base.json"
    for measured, said in (
        ([first, first, *rest], "net, fp32, ours, 1 twice"),
        ([first, other, *rest], "not as many as its launches"),
    ):
        path.write_text(json_text(document(measured)))
        with pytest.raises(InputError, match=f"(?s)is damaged.*{said}"):
            read_base(path)


def test_one_launch_is_never_judged() -> None:
    """What differs between launches is not known of it."""
    slow, then = run(0, factor=2.0), run(1)
    alone = [replace(m, launches=()) for m in slow]
    assert judged(slow, then).rows[0].verdict == "slower"
    assert judged(alone, then).rows[0].verdict == "unclear"
    assert judged(slow, [replace(m, launches=()) for m in then]).rows[0].verdict == "unclear"


def test_names_differ_by_what_else_was_timed() -> None:
    """Ours is "fastres" by itself, and "fp32 fastres" beside another precision."""
    then = [replace(m, target=f"net fp32 {m.target}") for m in run(1)]
    lanes = {"net fp32 ours": tuple(f"net fp32 {peer}" for peer in LANES["ours"])}
    found = compare(run(0, factor=1.1), LANES, base(then, lanes=lanes), "base.json", 0.05)
    assert [row.verdict for row in found.rows] == ["slower"]
    other = [replace(m, precision="bf16") for m in run(0)]
    with pytest.raises(InputError, match="not judged: ours at batch 1: base.json has not timed it"):
        judged(other, run(1))


def test_what_is_not_judged_is_named() -> None:
    both = [*run(0), *(replace(m, batch_size=8) for m in run(2))]
    found = judged(both, run(1))
    assert len(found.rows) == 1 and "not judged: ours at batch 8" in str(found)
    found = judged(run(1), both)
    assert len(found.rows) == 1 and "not timed now: ours at batch 8" in str(found)
    elsewhere = base(run(1), backends={"ours": "triton"})
    with pytest.raises(InputError, match="it ran on triton then"):
        compare(run(0), LANES, elsewhere, "base", 0.05, backends={"ours": "cpu"})


def test_other_versions_are_told() -> None:
    found = compare(run(0), LANES, base(run(1)), "b", 0.05, versions={"openvino": "2", "nncf": "3"})
    assert found.notes == ("since then: openvino 1 is now 2",)


@pytest.mark.parametrize(
    ("machine", "conditions", "said"),
    [
        ({"cpu": "Abacus 2"}, {}, "processor of b.json is Abacus 1, here it is Abacus 2"),
        ({"gpu": "H200"}, {}, "GPU"),
        ({"threads": 1}, {}, "number of threads"),
        ({}, {"transfers": "included"}, "transfers"),
        ({}, {"input": (3, 32, 32)}, "size of images"),
    ],
)
def test_other_conditions_are_refused(
    machine: dict[str, Any], conditions: dict[str, Any], said: str
) -> None:
    check_conditions(base(run(0)), "b.json", HERE, CONDITIONS)
    now = msgspec.structs.replace(CONDITIONS, **conditions)
    with pytest.raises(InputError, match=said):
        check_conditions(base(run(0)), "b.json", replace(HERE, **machine), now)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["run"].update(finished=False), "was interrupted"),
        (lambda d: d["measurements"][0]["round_ms"].__setitem__(0, 0.0), "is damaged"),
        (lambda d: d["measurements"][0]["round_ms"].__setitem__(0, 1e308), "is damaged"),
        (lambda d: d["measurements"][0]["round_ms"].__setitem__(0, 1e-320), "is damaged"),
        (lambda d: d["measurements"][0].update(round_ms=[]), "is damaged"),
        (lambda d: d["measurements"][1]["round_ms"].pop(), "is damaged"),
        (lambda d: d["measurements"][1].update(launches=[7, 7]), "is damaged"),
        (lambda d: d["measurements"][1].update(launches=[21, 0]), "is damaged"),
    ],
)
def test_damaged_bases(change: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path) -> None:
    sound = json.loads(json_text(document(run(0))))
    path = tmp_path / "base.json"
    path.write_text(json.dumps(sound))
    read_base(path)
    change(sound)
    path.write_text(json.dumps(sound))
    with pytest.raises(InputError, match=said):
        read_base(path)


def test_a_base_nested_too_deeply(tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    path.write_text('{"command": "bench", "schema": 1, "x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(InputError, match="holds no results of fastres bench"):
        read_base(path)


def test_a_peer_of_one_run_only_is_no_yardstick() -> None:
    found = judged(run(0)[:2], run(1))
    assert found.rows[0].yardstick == "eager" and found.slower == ()
    assert "speed now over speed in base.json" in str(found) and "eager" in str(found)
    with pytest.raises(InputError, match="no peer that runs fp32 was timed beside it"):
        judged(run(0)[:1], run(1))


def test_runs_without_anything_in_common() -> None:
    other = [replace(m, batch_size=8) for m in run(0)]
    with pytest.raises(InputError, match=r"(?s)nothing of ours can be judged.*not timed now: ours"):
        judged(other, run(1))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "holds no results of fastres bench"),
        ("[1, 2]", "holds no results of fastres bench"),
        ('{"command": "bench"}', "'bench' of schema 0"),
        ('{"command": "bench", "schema": 1}', "holds no results of fastres bench"),
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
