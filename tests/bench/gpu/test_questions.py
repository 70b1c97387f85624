"""bench.gpu.questions without a GPU: right in the interpreter, able to fail, compiled for sm_90."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.gpu.questions import asking
from bench.gpu.questions.case import Case, Library
from bench.kernels.posed import Posed
from fastres.backends.triton.planning.table import Tiles
from fastres.kernels import aot
from fastres.kernels.cost import Target

CPU, META = torch.device("cpu"), torch.device("meta")
SM_90 = Tiles(Target.typical(90))
LOADS = [
    f"l2: boxes of {rows} rows, {stages} stages, {per_sm} programs"
    for rows, stages, per_sm in ((64, 8, 2), (128, 6, 2), (256, 5, 1), (256, 3, 2), (64, 4, 4))
]


def posed(name: str, device: torch.device) -> Any:
    cases = asking.cases(SM_90, small=device == CPU)
    return next(case for case in cases if case.name.startswith(name)).pose(device)


def compiled(name: str) -> tuple[str, aot.KernelFacts]:
    """A case's first kernel for sm_90, as PTX and in facts; nothing spills, and there is room."""
    kernel = aot.compile_kernel(posed(name, META).calls[0], 90)
    facts = aot.facts_of(kernel)
    assert facts.spill_stores == facts.spill_loads == 0 and aot.fits(facts, 90)
    return kernel.asm["ptx"], facts


def kinds(facts: aot.KernelFacts) -> set[str]:
    """Its matrix instructions."""
    return {name.split(".")[0] for name in facts.instructions if aot.MATRIX.match(name)}


def test_small_cases_are_the_same_but_for_fp8() -> None:
    names = [case.name for case in asking.cases(SM_90)]
    assert len(set(names)) == len(names)
    small = [case.name for case in asking.cases(SM_90, small=True)]
    assert small == [name for name in names if "fp8" not in name]


def test_a_case_that_fails_is_a_row_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    y = torch.full((3,), float("nan"))

    def case(name: str, call: Callable[[], object], wrong: Callable[[], str | None]) -> Case:
        return Case("group", name, lambda device: Posed([Library(call, [y])], wrong), flops=6e6)

    def refuse() -> None:
        raise RuntimeError("no such tensor map")

    every = [
        case("refused", refuse, lambda: None),
        case("wrong", lambda: y.fill_(2), lambda: "all of it"),
        case("right", lambda: y.fill_(1), lambda: None if bool((y == 1).all()) else "not run"),
    ]
    monkeypatch.setattr(asking, "cases", lambda tiles, small: every)
    kept: list[dict[str, Any]] = []
    run = SimpleNamespace(device=CPU, out=tmp_path, groups=(), rows=lambda section: kept)
    for row in asking.questions(run):
        if not row.pop("asked", False):
            kept.append(row)
    refused, wrong, right, table = kept
    assert refused["refused"] == "RuntimeError: no such tensor map" and "us" not in refused
    assert wrong == {"name": "group, wrong", "group": "group", "right": False, "why": "all of it"}
    assert right["right"] and right["us"] > 0 and right["tflops"] > 0 and right["sets"] == 1
    assert table["name"] == "the fastest of 3 cases"
    assert table["table"].startswith("\ngroup, right: ") and "TFLOP/s" in table["table"]


@pytest.mark.interpret
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    "name",
    [
        "l2: boxes of 64",
        "launch: 54 kernels of 1 ",
        "launch: 54 kernels of 132 programs, 51 MB of weights, dependent and",
        "peak: fp16, 128",
        "peak: int8, 256",
        "peak: int8, PyTorch",
        "chain: layer1 batch 32, one",
        "chain: layer1 batch 32, three",
        "layout: 3x3 56x56 64->64, transposed",
        "layout: 3x3 56x56 64->64, pixels",
        "layout: 3x3 56x56 64->64, registers",
    ],
)
def test_the_checks_can_fail(name: str) -> None:
    case = posed(name, CPU)
    assert case.wrong() is not None, "nothing has been computed yet"
    for call in case.calls:
        call.run()
    assert case.wrong() is None
    next(iter(case.calls[0].tensors())).add_(1)
    assert case.wrong() is not None, "the operands are others now"


@pytest.mark.compile
@pytest.mark.parametrize("name", LOADS)
def test_loads_compile(name: str) -> None:
    per_sm = int(name.split(", ")[2].split()[0])
    _, facts = compiled(name)
    assert facts.count("UTMALDG") and kinds(facts) == {"HGMMA"}
    assert facts.shared_bytes * per_sm <= 227 * 1024 and facts.registers * 128 * per_sm <= 65_536


@pytest.mark.compile
@pytest.mark.parametrize("kind", ["fp16", "int8", "fp8"])
@pytest.mark.parametrize("tile", ["128x256", "256x128", "128x128"])
def test_peaks_compile(kind: str, tile: str) -> None:
    _, facts = compiled(f"peak: {kind}, {tile}")
    assert kinds(facts) == {{"fp16": "HGMMA", "int8": "IGMMA", "fp8": "QGMMA"}[kind]}


@pytest.mark.compile
@pytest.mark.parametrize("layout", ["transposed", "pixels first", "registers"])
@pytest.mark.parametrize(
    "of",
    [
        f"{conv}, LAYOUT, {tile}"
        for conv, tiles in (
            ("3x3 56x56 64->64", ("128x64x64", "256x64x64")),
            ("3x3 7x7 512->512", ("128x128x64 w8", "128x128x64 w4")),
            ("1x1 56x56 64->256", ("128x128x64 w8",)),
        )
        for tile in tiles
    ],
)
def test_layouts_compile(layout: str, of: str) -> None:
    ptx, facts = compiled("layout: " + of.replace("LAYOUT", layout))
    assert kinds(facts) == {"HGMMA"}
    first = set(re.findall(r"wgmma\.mma_async\S+\s+\{[^}]*\},\s*(\S)", ptx))
    assert first == {"{" if layout == "registers" else "%"}, "of the product's first operand"


@pytest.mark.compile
@pytest.mark.parametrize("way", ["plain", "dependent", "dependent and weights first"])
def test_launches_compile(way: str) -> None:
    name = f"launch: 54 kernels of 132 programs, 51 MB of weights, {way}"
    case = next(case for case in asking.cases(SM_90) if case.name == name)
    launch = case.pose(META).calls[0]
    ptx = aot.compile_kernel(launch, 90).asm["ptx"]
    assert launch.dependent == (way != "plain") == ("griddepcontrol.launch_dependents" in ptx)
    before, _, after = ptx.partition("griddepcontrol.wait")
    assert ("ld.global" in after) == (way != "plain") and "st.global" in (after or before)
    assert ("ld.global" in before) == (way != "dependent")


@pytest.mark.compile
def test_cases_are_compiled_beforehand() -> None:
    layout = "layout: 3x3 56x56 64->64, transposed, 128x64x64 w4 s4"
    assert asking.precompile(layout, SM_90.target) == 1
    assert asking.precompile("peak: fp16, PyTorch's", SM_90.target) == 0
