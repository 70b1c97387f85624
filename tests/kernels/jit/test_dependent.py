"""Dependent launches: every kernel lets the next one start, waits, and only then reads memory.

Weights, which no kernel writes, are asked for before the wait.
"""

import pytest
import torch
import triton
import triton.language as tl

from fastres.kernels.aot import compile_kernel, compile_launch, facts_of
from fastres.kernels.aot.cases import all_cases
from fastres.kernels.jit.dependent import share_of

FIRST = {"_layout_kernel", "_space_to_depth_kernel"}  # bring a plan's inputs: none is in front
LAUNCHES = {case.launch.kernel.__name__: case.launch for case in all_cases(90)}  # of every kernel
DEPENDENT = sorted(LAUNCHES.keys() - FIRST)
WEIGHTS = {  # tensors of them
    "bottleneck_chain_kernel": 3,
    "conv2d_kernel": 1,
    "conv2d_tma_kernel": 1,
    "_stem_pool_kernel": 1,
}


@pytest.mark.interpret
def test_nothing_changes_in_the_interpreter() -> None:
    launch = LAUNCHES["conv2d_kernel"]
    assert launch.overlapping() is launch


@pytest.mark.compile
def test_every_kernel_of_a_plan_is_here() -> None:
    assert set(DEPENDENT) == {
        "_avg_pool_kernel",
        "bottleneck_chain_kernel",
        "conv2d_kernel",
        "_elementwise_kernel",
        "_global_avg_pool_kernel",
        "_max_pool_kernel",
        "_stem_pool_kernel",
        "_sum_parts_kernel",
        "conv2d_tma_kernel",
    }


@pytest.mark.compile
@pytest.mark.parametrize("sm", [90, 100, 120])
@pytest.mark.parametrize("name", DEPENDENT)
def test_waits_before_it_touches_memory(name: str, sm: int) -> None:
    launch = LAUNCHES[name].overlapping()
    assert launch.dependent and launch.options["launch_pdl"] is True
    kernel = compile_kernel(launch, sm)
    facts = facts_of(kernel)
    assert facts.unguarded == 0 and facts.spill_stores == 0
    assert facts.count("ACQBULK") == facts.count("PREEXIT") == 1
    assert facts.ahead == facts.count("UBLKPF") == WEIGHTS.get(name, 0)
    assert kernel.metadata.launch_pdl


@pytest.mark.compile
@pytest.mark.parametrize("name", DEPENDENT)
def test_launched_as_usual_it_does_not_wait(name: str) -> None:
    facts = compile_launch(LAUNCHES[name], 90)
    assert facts.count("ACQBULK") == facts.count("PREEXIT") == facts.count("UBLKPF") == 0
    assert facts.unguarded > 0


@triton.jit
def write_shares(first_ptr, size_ptr, BYTES: tl.constexpr):
    first, size = share_of(BYTES)
    tl.store(first_ptr + tl.program_id(0), first)
    tl.store(size_ptr + tl.program_id(0), size)


@pytest.mark.parametrize("programs", [1, 7, 98, 500])
@pytest.mark.parametrize("size", [8, 128, 864, 1000, 4_718_592])
def test_programs_ask_for_all_weights_once(size, programs, device):
    first, sizes = torch.zeros(2, programs, dtype=torch.int32, device=device)
    write_shares[(programs,)](first, sizes, BYTES=size)
    end = 0
    for at, found in zip(first.tolist(), sizes.tolist(), strict=True):
        if found > 0:
            assert at == end and found % 16 == 0
            end = at + found
    assert end == size // 16 * 16
