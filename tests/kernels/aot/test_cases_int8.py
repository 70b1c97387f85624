"""Facts of the machine code of 8-bit kernels, with no GPU; `make kernels` has the rest of them."""

from dataclasses import replace

import pytest

from fastres.kernels.aot import KernelFacts, compile_launch, stores
from fastres.kernels.aot.cases_int8 import byte_cases
from fastres.kernels.aot.faults import byte_faults
from fastres.kernels.aot.table import print_table

pytestmark = pytest.mark.compile
NAMES = {  # one of each kind; chains are in test_bottleneck_chain_int8.py
    80: (
        "layer1.0.conv2-b256-i8",
        "layer4.1.conv3-b256-i8",
        "fc-b256-i8-to-fp16",
        "conv1.folded+maxpool-b256-i8",
    ),
    89: ("layer4.1.conv3-b256-fp8e4nv",),
    90: (
        "layer1.0.conv2-b256-i8",
        "layer1.0.conv2-b256-fp8e4nv",
        "layer4.1.conv3-b256-i8",
        "layer1.1.conv2.boxes-b256-i8",
        "layer2.0.conv3+downsample.boxes-b256-i8",
        "layer3.1.conv3.boxes-b256-i8",
        "layer3.1.conv3.boxes-b256-fp8e4nv",
        "layer4.1.conv2.boxes-b1-i8",
        "layer4.1.conv2.boxes.sum-b1-i8",
        "conv1.fold-bytes-b256-i8",
        "conv1.folded-b256-i8",
        "conv1.folded+maxpool-b256-i8",
        "map.to_nhwc-b256-i8",
        "map.to_nchw-b256-i8",
        "maxpool-b256-i8",
        "avgpool-b256-i8-to-i8",
        "add_relu-b256-i8",
    ),
}
CASES = [(sm, case) for sm in NAMES for case in byte_cases(sm) if case.name in NAMES[sm]]
assert len(CASES) == sum(map(len, NAMES.values())), "a name has gone"


@pytest.mark.parametrize(("sm", "case"), CASES, ids=[f"sm_{sm}-{case.name}" for sm, case in CASES])
def test_machine_code(sm, case):
    facts = compile_launch(case.launch, sm)
    assert (facts.spill_stores, facts.spill_loads) == (0, 0)
    assert byte_faults(case.launch, facts, sm) == []
    wide = facts.count("LDG", "128") + facts.count("LDGSTS", "128") + facts.count("UTMALDG")
    assert wide > 0 or "bytes" in case.name, "nothing is read 16 bytes at a time"


@pytest.mark.parametrize("name", ["layer1.0.conv2-b256-i8", "layer1.1.conv2.boxes-b256-i8"])
def test_fused_arithmetic_would_show(name):
    """The option travels: with it on, the same launch has products and sums rounded at once."""
    case = next(case for case in byte_cases(90) if case.name == name)
    facts = compile_launch(replace(case.launch, fp_fusion=True), 90)
    assert "rounded at once" in byte_faults(case.launch, facts, 90)[0]


def test_each_fault_is_seen():
    case = next(case for case in byte_cases(90) if case.name == "layer1.0.conv2-b256-i8")
    good = KernelFacts(128, 0, 0, 50_000, 4, {"IGMMA.64x64x32.S8.S8": 8, "LDGSTS.E.128": 4})
    assert byte_faults(case.launch, good, 90) == []
    for instructions, word in (
        ({}, r"matrix instructions [], expected one of ['IGMMA']"),
        ({"IMMA.16832.S8.S8.SAT": 4}, "matrix instructions ['IMMA']"),
        ({"IGMMA.64": 1, "HGMMA.64": 1}, "matrix instructions ['HGMMA', 'IGMMA']"),
        ({"IGMMA.64": 1, "LDG.E.U8": 3}, "3 loads of 1 or 2 bytes"),
        ({"IGMMA.64": 1, "STS.U8": 64, "STG.E.U8": 1}, "65 stores of a byte"),
    ):
        found = byte_faults(case.launch, replace(good, instructions=instructions), 90)
        assert word in found[0]
    assert "shared memory" in byte_faults(case.launch, replace(good, shared_bytes=10**6), 90)[0]


# stores of each case by bytes a thread, and beside them those of boxes that turned single bytes
STORES = {
    "layer1.1.conv2.boxes-b256-i8": {16: 4},  # {1: 64}
    "layer1.1.conv2.boxes-b256-fp8e4nv": {16: 4},  # {1: 64}
    "layer2.1.conv2.boxes-b256-i8": {16: 8},  # {1: 128}
    "layer3.1.conv3.boxes-b256-i8": {16: 8},  # {1: 128}
    "layer2.0.conv3+downsample.boxes-b256-i8": {16: 4},  # {1: 64}
    "layer4.1.conv2.boxes-b1-i8": {8: 4},  # parts of int32
    "layer4.1.conv2.boxes.sum-b1-i8": {4: 2, 8: 1},
    "layer1.1.chain-b256-i8": {2: 96, 16: 12},  # {1: 384}; b and out as operands are those of two
    "layer1.1.chain-b256-fp8e4nv": {2: 96, 16: 12},  # {1: 384}
    "layer2.1.chain-b256-i8": {2: 64, 16: 8},  # {1: 256}
    "layer1.0.conv2-b256-i8": {16: 8},
    "layer4.1.conv3-b256-i8": {16: 24},
    "conv1.folded-b256-i8": {16: 8},
}


@pytest.mark.parametrize("name", STORES)
def test_stores_are_wide(name):
    (case,) = (case for case in byte_cases(90) if case.name == name)
    facts = compile_launch(case.launch, 90)
    assert stores(facts) == STORES[name]
    assert facts.count("LDS", "S8") + facts.count("LDS", "U8") == 0, "a residual is read by bytes"


@pytest.mark.parametrize("name", ["layer1.0.conv2-b256-i8", "layer1.1.conv2.boxes-b256-i8"])
def test_one_instruction_rounds_and_saturates(name):
    """I2F, scale, bias, ReLU and half a conversion for each of 64 sums, and nothing else."""
    (case,) = (case for case in byte_cases(90) if case.name == name)
    facts = compile_launch(case.launch, 90)
    counts = {kind: facts.count(kind) for kind in ("FMUL", "FADD", "FMNMX", "F2IP", "FSETP")}
    assert counts == {"FMUL": 64, "FADD": 64, "FMNMX": 64, "F2IP": 32, "FSETP": 0}


def test_a_launch_of_8_bits_waits_for_its_predecessor():
    case = next(case for case in byte_cases(90) if case.name == "layer4.1.conv2.boxes.sum-b1-i8")
    facts = compile_launch(case.launch.overlapping(), 90)
    assert facts.unguarded == 0 and facts.count("ACQBULK") == 1


def test_table(capsys):
    print_table((case for case in byte_cases(90) if case.name == "maxpool-b256-i8"), 90)
    assert "maxpool-b256-i8" in capsys.readouterr().out
