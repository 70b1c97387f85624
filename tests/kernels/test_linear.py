from dataclasses import dataclass

import pytest
import torch

from fastres.kernels import reference
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.linear import global_avg_pool, global_avg_pool_cost, linear, linear_cost
from fastres.kernels.tiles import PoolTile

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class PoolCase:
    name: str
    x: tuple[int, int, int, int]  # N, H, W, C
    dtype: torch.dtype = HALF
    tile: PoolTile | None = None


@pytest.mark.parametrize(
    "case",
    [
        PoolCase("resnet", (2, 7, 7, 512)),
        PoolCase("resnet-bf16", (2, 7, 7, 128), BF16),
        PoolCase("resnet-fp32", (1, 7, 7, 64), FP32),
        PoolCase("cifar", (3, 8, 8, 64)),
        PoolCase("odd", (2, 5, 3, 37)),
        PoolCase("one-pixel", (2, 1, 1, 16)),
        PoolCase("large-picture", (1, 33, 19, 16)),
        PoolCase("many-tiles", (2, 5, 5, 40), tile=PoolTile(4, 16, 1)),
        PoolCase("batch-0", (0, 7, 7, 64)),
    ],
    ids=lambda case: case.name,
)
def test_global_avg_pool_matches_reference(case, device, guarded, poisoned, assert_parity):
    values = torch.randn(case.x, generator=torch.Generator().manual_seed(0))
    x = guarded(values.to(case.dtype).to(device))
    nchw = x.cpu().permute(0, 3, 1, 2)
    out = poisoned((case.x[0], case.x[3]), case.dtype, device)
    assert global_avg_pool(x, out=out, tile=case.tile) is out
    oracle = reference.global_avg_pool(nchw.double(), keepdim=False)
    assert_parity(out, oracle, reference.global_avg_pool(nchw, keepdim=False))


def test_global_avg_pool_of_a_view(device, guarded):
    wide = guarded(torch.randn(2, 8, 8, 24, device=device))
    x = wide[:, ::2, 1::2, 8:]
    torch.testing.assert_close(global_avg_pool(x), x.mean((1, 2)))


@dataclass(frozen=True)
class LinearCase:
    name: str
    n: int
    c: int
    k: int
    bias: bool = True
    activation: ActivationKind | None = None
    dtype: torch.dtype = HALF


@pytest.mark.parametrize(
    "case",
    [
        LinearCase("resnet50-fc", 2, 2048, 100),
        LinearCase("resnet18-fc-bf16", 3, 512, 40, dtype=BF16),
        LinearCase("cifar-fc-fp32", 5, 64, 10, dtype=FP32),
        LinearCase("odd", 7, 37, 11),
        LinearCase("one-by-one", 1, 1, 1),
        LinearCase("no-bias-relu", 4, 32, 16, bias=False, activation="relu"),
        LinearCase("excitation", 4, 16, 64, activation="sigmoid"),
        LinearCase("batch-0", 0, 64, 10),
    ],
    ids=lambda case: case.name,
)
def test_linear_matches_reference(case, device, guarded, poisoned, assert_parity):
    random = torch.Generator().manual_seed(0)

    def draw(*sizes: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(sizes, generator=random) * scale
        return guarded(values.to(case.dtype).to(device))

    x, weight = draw(case.n, case.c), draw(case.k, case.c, scale=case.c**-0.5)
    bias = draw(case.k) if case.bias else None
    out = poisoned((case.n, case.k), case.dtype, device)
    assert linear(x, weight, bias, activation=case.activation, out=out) is out
    operands = [None if t is None else t.cpu() for t in (x, weight, bias)]
    oracle = reference.linear(
        *[None if t is None else t.double() for t in operands], case.activation
    )
    assert_parity(out, oracle, reference.linear(*operands, case.activation))


def test_linear_allocates_and_reads_strided_rows(device):
    x = torch.randn(4, 32, device=device)[::2, :16]
    weight = torch.randn(8, 16, device=device)
    y = linear(x, weight)
    assert y.shape == (2, 8) and y.is_contiguous()
    torch.testing.assert_close(y.cpu(), (x.cpu() @ weight.cpu().T))


X, W = torch.zeros(2, 16), torch.zeros(8, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, r"x has shape \[16\], expected \[N, C\]"),
        ({"weight": W[0]}, r"weight has shape \[16\], expected \[K, C\]"),
        ({"weight": W[:, :4]}, "expected .*16"),
        ({"weight": W.half()}, "weight has dtype torch.float16, expected torch.float32"),
        ({"bias": torch.zeros(3)}, r"bias has shape \[3\], expected \[8\]"),
        ({"out": torch.zeros(2, 9)}, r"out has shape \[2, 9\], expected \[2, 8\]"),
        ({"out": torch.zeros(8, 2).T}, "out has strides .* contiguous"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "-".join(value),
)
def test_linear_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear(**{"x": X, "weight": W} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X}, r"x has shape \[2, 16\], expected \[N, H, W, C\]"),
        ({"x": torch.zeros(2, 0, 3, 16)}, "no pixels"),
        ({"out": torch.zeros(1, 15)}, r"out has shape \[1, 15\], expected \[1, 16\]"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "-".join(value),
)
def test_global_avg_pool_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        global_avg_pool(**{"x": torch.zeros(1, 2, 2, 16)} | arguments)


def test_costs():
    assert linear_cost(2, 2048, 1000, itemsize=2).flops == 2 * 2 * 2048 * 1000
    assert global_avg_pool_cost(2, 7, 7, 2048, itemsize=2).bytes == 2 * 2 * 2048 * 50
