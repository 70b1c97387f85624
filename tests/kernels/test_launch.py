import sys
from dataclasses import replace

import pytest
import torch
import triton
from triton import knobs
from triton.runtime import jit

from fastres.kernels.aot.cases import all_cases
from fastres.kernels.conv2d import conv2d
from fastres.kernels.cost import Cost, Target, least_seconds, target_of
from fastres.kernels.linear import global_avg_pool
from fastres.kernels.pool import max_pool

X = torch.zeros(1, 8, 8, 16)


@pytest.mark.skipif(knobs.runtime.interpret, reason="the interpreter takes CPU tensors")
@pytest.mark.parametrize(
    "call",
    [
        lambda: conv2d(X, torch.zeros(8, 1, 1, 16)),
        lambda: max_pool(X, kernel=(2, 2), stride=(2, 2)),
        lambda: global_avg_pool(X),
    ],
    ids=["conv2d", "max_pool", "global_avg_pool"],
)
def test_cpu_tensor_says_what_to_do(call):
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before"):
        call()


def test_batch_0_needs_no_device():
    assert conv2d(X[:0], torch.zeros(8, 3, 3, 16)).shape == (0, 6, 6, 8)
    assert max_pool(X[:0], kernel=(2, 2), stride=(2, 2)).shape == (0, 4, 4, 16)
    assert global_avg_pool(X[:0]).shape == (0, 16)


def test_target_of_the_cpu_is_the_reference_gpu():
    assert target_of(torch.device("cpu")) == Target.typical(90)


@pytest.mark.parametrize(
    ("itemsize", "tensor_cores", "slower"),
    [(1, True, 0.5), (2, True, 1), (4, True, 2), (4, False, 16)],
    ids=str,
)
def test_the_roofline_is_the_longer_of_arithmetic_and_traffic(itemsize, tensor_cores, slower):
    target = Target(90, 132)
    rate = target.fp16_flops * 132 / slower
    assert least_seconds(Cost(10**12, 1), target, itemsize, tensor_cores) == pytest.approx(
        1e12 / rate
    )
    traffic = Cost(1, 10**12)
    assert least_seconds(traffic, target, itemsize, tensor_cores) == 1e12 / target.dram_bytes


@pytest.mark.gpu
def test_target_of_a_gpu():
    target = target_of(torch.device("cuda"))
    assert target.sm >= 80 and target.sm_count >= 1


@pytest.mark.compile
@pytest.mark.parametrize("order", [1, -1], ids=["in order", "reversed"])
def test_a_kernels_key_is_asked_for_after_all_it_calls(order, monkeypatch):
    """In Triton 3.6 another order gives other keys: what was compiled elsewhere is not found."""
    launches = {case.launch.kernel: case.launch for case in all_cases(90)}
    functions = [
        value
        for name, module in sys.modules.items()
        if name.startswith("fastres.kernels")
        for value in vars(module).values()
        if isinstance(value, jit.JITCallable)
    ]
    before = {function: function.cache_key for function in functions}
    for function in functions:
        monkeypatch.setattr(function, "hash", None)
        monkeypatch.setattr(function, "used_global_vals", {})
    merge, called = jit.DependenciesFinder._update_hash, []

    def watched(finder, function):
        called.append(function)
        assert function.hash is not None, f"{finder.name} asked before {function.__name__}"
        merge(finder, function)

    monkeypatch.setattr(jit.DependenciesFinder, "_update_hash", watched)
    for launch in list(launches.values())[::order]:
        replace(launch)
        assert launch.kernel.hash is not None
    assert len(called) > 10
    asked = [function for function in functions if function.hash is not None]
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8):
        assert all(function.cache_key == before[function] for function in asked)
