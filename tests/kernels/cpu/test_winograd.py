"""fastres.kernels.cpu.winograd: against PyTorch in float64, on every set of instructions here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.kernels.cpu import library
from fastres.kernels.cpu.winograd import TILES, Blocking, Weights, convolve

pytestmark = pytest.mark.skipif(
    library.why_not() is not None, reason=f"no kernels for the CPU here: {library.why_not()}"
)
SETS = range(1, library.instructions() + 1)
GUARD = 64  # numbers around y that are not to be touched
# images, height, width, channels, outputs: whole tiles, ragged ones, parts of vectors and panels
SHAPES = [
    (1, 8, 8, 16, 32),
    (2, 7, 7, 64, 64),
    (1, 14, 13, 24, 40),
    (3, 5, 9, 3, 7),
    (1, 1, 1, 16, 33),
    (1, 2, 30, 130, 65),
    (5, 4, 4, 31, 15),
]


def case(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, height, width, channels, outputs = shape
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(images, height, width, channels, generator=draw).relu()
    weight = torch.randn(outputs, channels, 3, 3, generator=draw) * (2 / (9 * channels)) ** 0.5
    bias = torch.randn(outputs, generator=draw)
    return x, weight, bias, torch.randn(images, height, width, outputs, generator=draw)


def exact(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    y = F.conv2d(x.permute(0, 3, 1, 2).double(), weight.double(), bias.double(), padding=1)
    y = y.permute(0, 2, 3, 1)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def run(x: Tensor, weights: Weights, blocking: Blocking, **more: Any) -> Tensor:
    """Into memory that holds NaN, between guards."""
    shape = (*x.shape[:3], weights.outputs)
    count = torch.Size(shape).numel()
    memory = torch.full((count + 2 * GUARD,), float("nan"))
    memory[:GUARD] = memory[-GUARD:] = 7.0
    y = memory[GUARD : GUARD + count].view(shape)
    convolve(x, weights, y, blocking, **more)
    assert bool((memory[:GUARD] == 7).all()) and bool((memory[-GUARD:] == 7).all())
    return y


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(isa: int, tile: int, shape: tuple[int, ...]) -> None:
    x, weight, bias, residual = case(shape)
    weights = Weights(weight, bias, tile, isa)
    for shared, more, block in ((False, None, 3), (True, residual, 5), (False, residual, 1000)):
        for relu in (False, True):
            blocking = Blocking(tile, block, shared, 1)
            y = run(x, weights, blocking, residual=more, relu=relu, threads=2)
            want = exact(x, weight, bias, more, relu)
            # 4.4e-6 is the largest seen, of 512 channels; a wrong tap is beyond 1e-2
            assert float((y - want).abs().max()) < 1e-5


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("tile", TILES)
def test_no_bit_depends_on_blocks_or_threads(isa: int, tile: int) -> None:
    x, weight, bias, residual = case((2, 15, 17, 72, 100))
    weights = Weights(weight, bias, tile, isa)
    ways = [Blocking(tile, 1), Blocking(tile, 7), Blocking(tile, 999), Blocking(tile, 5, True, 1)]
    found = [
        run(x, weights, blocking, residual=residual, threads=threads)
        for blocking in (*ways, Blocking(tile, 64, True, 3))
        for threads in (1, 2, 3)
    ]
    assert all(torch.equal(found[0], y) for y in found[1:])


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("tile", TILES)
def test_an_empty_batch(isa: int, tile: int) -> None:
    x, weight, bias, _ = case((0, 4, 4, 16, 16))
    for shared in (False, True):
        y = run(x, Weights(weight, bias, tile, isa), Blocking(tile, 4, shared))
        assert y.shape == (0, 4, 4, 16)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_goes_no_further_than_it_should(
    isa: int, tile: int, value: float
) -> None:
    """A transform spreads it over a whole tile; PyTorch has it where a tap reads it."""
    x, weight, bias, _ = case((1, 12, 12, 20, 24))
    x[0, 4, 6, 17] = value
    weight[3] = 0  # nothing times infinity is NaN
    y = run(x, Weights(weight, bias, tile, isa), Blocking(tile, 4), relu=True, threads=2)
    want = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1).relu().permute(0, 2, 3, 1)
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
    usual = want.isfinite()
    assert float((y - want)[usual].abs().max()) < 1e-5
    assert bool(usual[0, :3].all()) and not bool(usual[0, 3:6, 5:8].all())


@pytest.mark.parametrize("isa", SETS)
def test_short_chains_round_less(isa: int) -> None:
    """F(4) of 512 channels: 0.82 times the error of PyTorch's own sums; in one chain 2.1 times."""
    x, weight, bias, _ = case((1, 14, 14, 512, 64))
    want = exact(x, weight, bias)
    own = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)
    y = run(x, Weights(weight, bias, 4, isa), Blocking(4, 16), threads=2)
    assert float((y - want).norm()) < 1.2 * float((own - want).norm())


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias, residual = case((1, 4, 4, 16, 16))
    weights, y = Weights(weight, bias, 2), torch.empty(1, 4, 4, 16)
    for why, call in {
        "16 channels, the weights 8": lambda: convolve(
            x, Weights(weight[:, :8], bias, 2), y, Blocking(2, 4)
        ),
        "y is .1, 4, 4, 16.": lambda: convolve(x, weights, y[:, :3], Blocking(2, 4)),
        "residual is": lambda: convolve(x, weights, y, Blocking(2, 4), residual=residual[..., :8]),
        "for tiles of 2, not 4": lambda: convolve(x, weights, y, Blocking(4, 4)),
        "at least 1": lambda: convolve(x, weights, y, Blocking(2, 0)),
        "float32 on the CPU, not torch.float64": lambda: convolve(
            x.double(), weights, y, Blocking(2, 4)
        ),
        "x is contiguous": lambda: convolve(x.transpose(1, 2), weights, y, Blocking(2, 4)),
        "there are tiles of": lambda: Weights(weight, bias, 3),
        "weights of 3x3": lambda: Weights(weight[..., :1], bias, 2),
        "the bias is .16.": lambda: Weights(weight, bias[:3], 2),
    }.items():
        with pytest.raises(ValueError, match=why):
            call()
