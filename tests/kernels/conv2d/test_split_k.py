from dataclasses import dataclass

import pytest
import torch

from fastres.kernels import reference
from fastres.kernels.conv2d.split_k import sum_parts, sum_parts_cost
from fastres.kernels.epilogue import ActivationKind


@dataclass(frozen=True)
class Case:
    name: str
    parts: tuple[int, int, int]  # PARTS, M, K
    bias: bool = True
    residual: bool = False
    activation: ActivationKind | None = "relu"
    dtype: torch.dtype = torch.float16


CASES = (
    Case("layer4.0.conv2", (12, 49, 512)),
    Case("residual", (4, 49, 512), residual=True),
    Case("bf16", (2, 20, 256), residual=True, dtype=torch.bfloat16),
    Case("fp32", (3, 20, 256), residual=True, dtype=torch.float32),
    Case("odd", (9, 13, 129), residual=True),
    Case("one-part", (1, 7, 8), bias=False, activation=None),
    Case("gelu", (2, 8, 128), activation="gelu"),
    Case("empty", (4, 0, 64), residual=True),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(case, device, guarded, poisoned, assert_parity):
    random = torch.Generator().manual_seed(0)
    count, m, k = case.parts

    def draw(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return guarded(torch.randn(sizes, generator=random).to(dtype).to(device))

    parts = draw(count, m, k)
    bias = draw(k) if case.bias else None
    residual = draw(m, k, dtype=case.dtype) if case.residual else None
    oracle = parts.cpu().double().sum(0)
    for added in (bias, residual):
        oracle = oracle if added is None else oracle + added.cpu().double()
    if case.activation is not None:
        oracle = reference.activation(oracle, case.activation)
    out = poisoned((m, k), case.dtype, device)
    assert sum_parts(parts, bias, residual, out, activation=case.activation) is out
    assert_parity(out, oracle, oracle.to(case.dtype))


def test_keeps_nan(device):
    parts = torch.zeros((3, 4, 8), device=device)
    parts[1, 2, 3] = float("nan")
    out = sum_parts(parts, None, None, torch.ones((4, 8), device=device), activation="relu")
    assert out.isnan().nonzero().tolist() == [[2, 3]]


PARTS = torch.zeros(3, 4, 8)
OUT = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": PARTS[0]}, r"parts has shape \[4, 8\], expected \[PARTS, M, K\]"),
        ({"parts": PARTS[:0]}, r"parts has shape \[0, 4, 8\]"),
        ({"parts": PARTS.half()}, "parts has dtype torch.float16, expected torch.float32"),
        ({"parts": PARTS.mT.contiguous().mT}, "parts has strides"),
        ({"bias": OUT[0, :4]}, r"bias has shape \[4\], expected \[8\]"),
        ({"residual": OUT.half()}, "residual has dtype torch.float16, expected torch.float32"),
        ({"out": OUT[:2]}, r"out has shape \[2, 8\], expected \[4, 8\]"),
        ({"out": OUT.double()}, "out has dtype torch.float64"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "-".join(value),
)
def test_rejects(arguments, message):
    given = {"parts": PARTS, "bias": None, "residual": None, "out": OUT} | arguments
    with pytest.raises(ValueError, match=message):
        sum_parts(given["parts"], given["bias"], given["residual"], given["out"])


def test_cost():
    cost = sum_parts_cost(3, 4, 8, 2, residual=True)
    assert (cost.flops, cost.bytes) == (3 * 32, 32 * (12 + 4))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_parts_of_int32_are_summed_exactly(dtype, device, guarded, poisoned, assert_exact):
    random = torch.Generator().manual_seed(0)
    parts = torch.randint(-(2**26), 2**26, (5, 13, 129), generator=random, dtype=torch.int32)
    scale, bias = torch.rand(129, generator=random) / 2**26, torch.randn(129, generator=random)
    residual = torch.randint(-128, 128, (13, 129), generator=random, dtype=torch.int8)
    out = poisoned((13, 129), dtype, device)
    sum_parts(
        guarded(parts.to(device)),
        guarded(bias.to(device)),
        guarded(residual.to(device)),
        out,
        activation="relu",
        scale=guarded(scale.to(device)),
        residual_scale=0.01,
        out_scale=30.0,
    )
    acc = parts.sum(0, dtype=torch.int32)
    assert (acc.abs() > 2**25).any(), "beyond what fp32 adds exactly"
    assert_exact(out, reference.finish_int8(acc, scale, bias, residual, 0.01, "relu", 30.0, dtype))
