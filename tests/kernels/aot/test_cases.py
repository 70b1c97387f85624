"""Facts of the machine code, with no GPU: spills, shared memory, instructions, load widths."""

import sys
from dataclasses import replace

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastres.kernels.aot import (
    KernelFacts,
    compile_kernel,
    compile_launch,
    fits,
    narrow_loads,
    table,
)
from fastres.kernels.aot.cases import all_cases
from fastres.kernels.aot.cases_int8 import byte_cases
from fastres.kernels.tiles import ConvTile

pytestmark = pytest.mark.compile

# kernels that move boxes through descriptors have checks of their own beside their values
CASES = [
    (sm, case) for sm in (80, 90) for case in all_cases(sm) if "x_ptr" in case.launch.arguments
]
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA"}


def tile_of(launch) -> ConvTile:
    blocks = [launch.constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
    return ConvTile(*blocks, launch.num_warps, launch.num_stages)


@pytest.mark.parametrize(("sm", "case"), CASES, ids=[f"sm_{sm}-{case.name}" for sm, case in CASES])
def test_machine_code(sm, case):
    facts = compile_launch(case.launch, sm)
    assert (facts.spill_stores, facts.spill_loads) == (0, 0)
    assert fits(facts, sm)
    x = case.launch.arguments["x_ptr"]
    channels = case.launch.constants["C"]
    if channels * x.element_size() % 16 == 0:
        loads = facts.count("LDG", "128") + facts.count("LDGSTS", "128")
        assert loads > 0, "x is not read 16 bytes at a time"
        assert narrow_loads(case.launch, facts) == 0, "something is read 2 bytes at a time"
    if "BLOCK_N" in case.launch.constants:
        assert facts.shared_bytes <= tile_of(case.launch).shared_bytes(x.element_size())
        full_precision = case.name.endswith("fp32")
        expected = {sm: 0 if full_precision else 1 for sm in MATRIX_INSTRUCTION}
        for other, instruction in MATRIX_INSTRUCTION.items():
            wanted = expected[other] if other == sm else 0
            assert (facts.count(instruction) > 0) == bool(wanted), facts.instructions


def test_narrow_loads_of_a_product_are_seen():
    case = next(case for case in all_cases(90) if case.name == "conv1-b256-fp16")  # 3 channels
    facts = compile_launch(case.launch, 90)
    assert 0 < facts.narrow <= narrow_loads(case.launch, facts)
    constants = {**case.launch.constants, "MERGED": 8}
    assert narrow_loads(replace(case.launch, constants=constants), facts) == facts.narrow


def test_residual_of_fewer_channels_compiles():
    case = next(case for case in all_cases(90) if "conv3" in case.name)
    constants = {**case.launch.constants, "RESIDUAL_CHANNELS": 24, "RESIDUAL_OFFSET": 8}
    facts = compile_launch(replace(case.launch, constants=constants), 90)
    assert facts.spill_stores == 0 and facts.count("HGMMA") > 0


def test_strides_beyond_32_bits_compile():
    case = next(case for case in all_cases(90) if "layer1.0.conv2" in case.name)
    arguments = {**case.launch.arguments, "stride_xn": 2**31}
    assert compile_launch(replace(case.launch, arguments=arguments), 90).spill_stores == 0


def test_the_checks_can_fail():
    """A tile far too large spills and does not fit: the facts above are no empty promise."""
    case = next(case for case in all_cases(80) if "layer2.0.conv2" in case.name)
    constants = {**case.launch.constants, "BLOCK_M": 256, "BLOCK_N": 128}
    launch = replace(case.launch, constants=constants, num_warps=4, num_stages=6)
    facts = compile_launch(launch, 80)
    assert facts.spill_stores > 0 and facts.spill_loads > 0
    assert not fits(facts, 80)


def test_facts_count_by_parts_of_a_name():
    names = {"LDGSTS.E.BYPASS.128": 3, "LDG.E.128": 2, "LDG.E.64": 5}
    facts = KernelFacts(32, 0, 0, 0, 4, names)
    assert facts.count("LDG") == 7
    assert facts.count("LDG", "128") == 2
    assert facts.count("HMMA") == 0


def test_table(monkeypatch, capsys):
    cases = [case for case in all_cases(90) if case.name == "maxpool-b256-fp16"]
    monkeypatch.setattr(table, "all_cases", lambda sm: iter(cases))
    monkeypatch.setattr(sys, "argv", ["table", "--sm", "90"])
    table.main()
    assert "maxpool-b256-fp16" in capsys.readouterr().out


def test_cases_are_never_run():
    for case in all_cases(90):
        for value in case.launch.arguments.values():
            assert not isinstance(value, torch.Tensor) or value.device.type == "meta"


class OnHopper:
    """As much of a driver as Triton's JIT needs to compile for a GPU that is not here."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


BYTES = (  # scales as numbers and absent ones, parts of int32, no fused arithmetic
    "layer4.1.conv3-b1-i8",
    "layer4.1.conv2.boxes-b1-i8",
    "layer4.1.conv2.boxes.sum-b1-i8",
    "layer1.1.chain-b1-i8",
)


@pytest.mark.parametrize(
    "case",
    [
        *(
            case
            for case in all_cases(90)
            if "-b1-" in case.name or "layer1.0.conv3-b256" in case.name
        ),
        *(case for case in byte_cases(90) if case.name in BYTES),
    ],
    ids=lambda case: case.name,
)
def test_what_is_compiled_here_is_what_the_jit_would_look_for(case, monkeypatch):
    """The same key in Triton's cache: a GPU's first call finds what was compiled without one."""
    monkeypatch.setattr(driver, "_active", OnHopper())
    launch = case.launch
    options = {**launch.arguments, **launch.constants, **launch.options}
    theirs = launch.kernel.warmup(grid=(launch.programs,), **options)
    assert compile_kernel(launch, 90).hash == theirs.hash
