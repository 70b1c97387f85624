"""Every kernel of a whole network compiled: the quick part of `make kernels`, with its checks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.kernels import __main__ as script
from fastres.kernels.aot import KernelFacts

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("sm", [80, 90])
def test_resnet50_at_batch_256_and_1(sm: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--quick", "--sm", str(sm)]) == 0, capsys.readouterr().out
    assert ", 0 with faults" in capsys.readouterr().out


def test_each_fault_is_seen() -> None:
    case = next(script.cases(80, quick=True))
    graph, tiles = script.graph_of(case.net), script.Tiles(script.Target.typical(80))
    _, found = script.kernels(graph, case, tiles, {})
    launch = next(launch for node, _, launch in found if "layer1" in node)
    good = KernelFacts(128, 0, 0, 50_000, 4, {"HMMA.16816": 8, "LDGSTS.E.128": 4})
    assert script.faults(launch, good, 80, "fp16") == []
    for bad, word in (
        (replace(good, spill_loads=4), "spilled"),
        (replace(good, shared_bytes=200_000), "shared memory"),
        (replace(good, instructions={"FFMA": 8}), "no HMMA"),
        (replace(good, instructions={**good.instructions, "LDG.E.U16": 1}), "of 1 or 2 bytes"),
    ):
        assert word in script.faults(launch, bad, 80, "fp16")[0]
    early = script.faults(launch.overlapping(), replace(good, unguarded=2), 90, "fp16")
    assert "2 accesses before the wait" in early[0]
    mixed = replace(good, instructions={"HMMA.16816": 8, "HGMMA.64x64x16": 8})
    assert "HMMA beside HGMMA" in script.faults(launch, mixed, 90, "fp16")


def test_the_full_table_covers_what_it_promises() -> None:
    cases = list(script.cases(90, quick=False))
    assert {case.batch for case in cases} == {1, 32, 256}
    assert {case.precision for case in cases} == {"fp16", "bf16", "tf32", "fp32", "int8", "fp8"}
    assert "fp8" not in {case.precision for case in script.cases(86, quick=False)}
    assert len({case.net for case in cases}) == 5 and script.SMS == (80, 86, 89, 90, 100, 120)
