"""int8 outside convolutions: pools, the classifier, sums with scales of their own."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastres.kernels import reference
from fastres.kernels.elementwise import add_act, elementwise, elementwise_launch
from fastres.kernels.linear import global_avg_pool, global_avg_pool_launch, linear
from fastres.kernels.pool import avg_pool, max_pool
from fastres.kernels.tiles import PoolTile

INT8, HALF, BF16, FP32 = torch.int8, torch.float16, torch.bfloat16, torch.float32
FP8 = torch.float8_e4m3fn


def bytes_of(*sizes: int, seed: int = 0, low: int = -128, high: int = 128) -> torch.Tensor:
    return torch.randint(low, high, sizes, generator=torch.Generator().manual_seed(seed)).to(INT8)


def nchw(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("x", "window", "options"),
    [
        ((2, 16, 14, 64), ((3, 3), (2, 2)), {"padding": (1, 1)}),
        ((3, 9, 7, 33), ((3, 3), (2, 2)), {"padding": (1, 1)}),
        ((1, 8, 8, 16), ((2, 2), (2, 2)), {}),
        ((1, 9, 8, 5), ((3, 2), (2, 1)), {"padding": (1, 1), "ceil_mode": True}),
        ((1, 9, 9, 16), ((2, 2), (1, 1)), {"dilation": (2, 2), "padding": (1, 1)}),
        ((0, 8, 8, 16), ((3, 3), (2, 2)), {"padding": (1, 1)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_max_pool(x, window, options, dtype, device, guarded, poisoned, assert_exact):
    # below zero, so that a padding of zeros would win
    given = bytes_of(*x, high=-100)
    if dtype == FP8:
        given = (given.float() * 3.5).to(FP8)
    oracle = reference.max_pool(nchw(given.double()), *window, **options).permute(0, 2, 3, 1)
    out = poisoned(oracle.shape, dtype, device)
    around = guarded if dtype == INT8 else lambda v: v
    kernel, stride = window
    max_pool(around(given.to(device)), kernel=kernel, stride=stride, out=out, **options)
    assert (oracle < 0).all()
    if dtype == FP8:
        assert torch.equal(out.cpu().double(), oracle)
    else:
        assert_exact(out, oracle)


def test_max_pool_may_give_the_least_of_int8(device):
    x = torch.full((1, 4, 4, 16), -128, dtype=INT8, device=device)
    y = max_pool(x, kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    assert y.dtype == INT8 and (y == -128).all()


@pytest.mark.parametrize(
    ("x", "dtype", "out_scale", "tile"),
    [
        ((2, 7, 7, 2048), INT8, 1 / 0.013, None),
        ((2, 7, 7, 96), FP32, 1.0, None),
        ((3, 7, 7, 64), HALF, 1.0, None),
        ((1, 7, 7, 64), BF16, 1.0, None),
        ((2, 1, 1, 33), INT8, 1.0, None),
        ((2, 9, 5, 7), INT8, 3.0, PoolTile(4, 4, 1)),
        ((0, 7, 7, 64), INT8, 3.0, None),
    ],
    ids=str,
)
def test_global_avg_pool(x, dtype, out_scale, tile, device, guarded, poisoned, assert_exact):
    given = bytes_of(*x, low=-20)
    wanted = FP32 if dtype == BF16 else dtype
    oracle = reference.global_avg_pool_int8(nchw(given), 0.031, out_scale, wanted, keepdim=False)
    out = poisoned((x[0], x[3]), dtype, device)
    x_scale = {"scale": 0.031, "out_scale": out_scale}
    assert global_avg_pool(guarded(given.to(device)), out=out, tile=tile, **x_scale) is out
    assert_exact(out, oracle)
    if dtype == INT8 and out_scale > 10:
        assert 0.1 < (oracle == 127).double().mean() < 0.9, "some saturate"


@pytest.mark.parametrize("dtype", [FP32, HALF, INT8])
@pytest.mark.parametrize(("n", "c", "k"), [(3, 64, 40), (1, 96, 1), (2, 33, 10), (0, 64, 10)])
def test_linear(n, c, k, dtype, device, guarded, poisoned, assert_exact):
    x, weight = bytes_of(n, c), bytes_of(k, c, seed=1)
    random = torch.Generator().manual_seed(2)
    scale = torch.rand(k, generator=random) / (74.0**2 * c**0.5)
    bias = torch.randn(k, generator=random)
    out_scale = 60.0 if dtype == INT8 else 1.0
    oracle = reference.linear_int8(x, weight, scale, bias, None, out_scale, dtype)
    out = poisoned((n, k), dtype, device)
    given = [guarded(v.to(device)) for v in (x, weight, bias)]
    assert linear(*given, scale=guarded(scale.to(device)), out_scale=out_scale, out=out) is out
    assert_exact(out, oracle)


@dataclass(frozen=True)
class Sum:
    name: str
    x: tuple[int, ...] = (2, 5, 7, 64)
    dtypes: tuple[torch.dtype, ...] = (INT8, INT8, INT8)  # of x, residual and y
    residual: bool = True
    scale: bool = False
    shift: bool = False
    per_image: bool = False
    activation: Any = "relu"
    x_scale: float = 0.011
    residual_scale: float = 0.037
    out_scale: float = 1 / 0.029

    def operands(self) -> dict[str, Any]:
        random = torch.Generator().manual_seed(3)

        def draw(dtype: torch.dtype, seed: int) -> torch.Tensor:
            wide = torch.randn(self.x, generator=torch.Generator().manual_seed(seed))
            return bytes_of(*self.x, seed=seed) if dtype == INT8 else (90 * wide).to(dtype)

        sizes = (self.x[0], self.x[-1]) if self.per_image else (self.x[-1],)
        return {
            "x": draw(self.dtypes[0], 0),
            "residual": draw(self.dtypes[1], 1) if self.residual else None,
            "scale": 0.5 + torch.rand(sizes, generator=random) if self.scale else None,
            "shift": torch.randn(sizes, generator=random) if self.shift else None,
        }

    def meaning(self, x, residual, scale, shift) -> torch.Tensor:
        """Left to right in fp32, one operation at a time."""

        def wide(v: torch.Tensor) -> torch.Tensor:
            return v.view(len(v), *[1] * (x.ndim - 2), -1) if v.ndim == 2 else v

        v = x.float() * torch.tensor(self.x_scale, dtype=FP32)
        if scale is not None:
            v = v * wide(scale)
        if shift is not None:
            v = v + wide(shift)
        if residual is not None:
            v = v + residual.float() * torch.tensor(self.residual_scale, dtype=FP32)
        v = v if self.activation is None else reference.activation(v, self.activation)
        v = v * torch.tensor(self.out_scale, dtype=FP32)
        return reference.requantise(v) if self.dtypes[2] == INT8 else v

    def factors(self) -> dict[str, float]:
        residual = {"residual_scale": self.residual_scale} if self.residual else {}
        return {"x_scale": self.x_scale, "out_scale": self.out_scale} | residual


SUMS = (
    Sum("add-relu"),
    Sum("add", activation=None),
    Sum("odd", (3, 5, 3, 33)),
    Sum("matrix", (5, 40)),
    Sum("batch-norm", residual=False, scale=True, shift=True),
    Sum("squeeze-excite", scale=True, per_image=True),
    Sum("everything", scale=True, shift=True, activation=None),
    Sum("half-residual", dtypes=(INT8, HALF, INT8)),
    Sum("half-and-int8", dtypes=(HALF, INT8, INT8)),
    Sum("to-half", dtypes=(INT8, INT8, HALF), out_scale=1.0),
    Sum("to-bf16", dtypes=(INT8, INT8, BF16), out_scale=1.0),
    Sum("quantise", dtypes=(FP32, FP32, INT8), residual=False, x_scale=1.0, activation=None),
    Sum("dequantise", dtypes=(INT8, FP32, FP32), residual=False, out_scale=1.0, activation=None),
    Sum("scales-of-1", x_scale=1.0, residual_scale=1.0, out_scale=1.0, activation=None),
    Sum("empty", (0, 5, 7, 64)),
)


@pytest.mark.parametrize("case", SUMS, ids=lambda case: case.name)
def test_elementwise(case, device, guarded, poisoned, assert_exact):
    given = case.operands()
    oracle = case.meaning(**given)
    out = poisoned(case.x, case.dtypes[2], device)
    moved = {k: None if v is None else guarded(v.to(device)) for k, v in given.items()}
    x = moved.pop("x")
    assert elementwise(x, out=out, activation=case.activation, **moved, **case.factors()) is out
    assert_exact(out, oracle)
    if case.dtypes[2] == INT8 and oracle.numel():
        assert 0 < (oracle == 127).double().mean() < 0.6, "some saturate"


def test_sums_are_finish_int8(device):
    a, b = bytes_of(2, 4, 4, 16), bytes_of(2, 4, 4, 16, seed=1)
    scales = {"a_scale": 0.011, "b_scale": 0.037, "out_scale": 1 / 0.029}
    y = add_act(a.to(device), b.to(device), "relu", **scales)
    a_scale = torch.tensor(0.011, dtype=FP32)
    wanted = reference.finish_int8(a.int(), a_scale, None, b, 0.037, "relu", 1 / 0.029, INT8)
    assert torch.equal(y.cpu(), wanted)


def test_sums_of_views(device, guarded):
    a, b = guarded(bytes_of(2, 8, 8, 24).to(device)), bytes_of(2, 4, 4, 16, seed=1).to(device)
    view = a[:, ::2, 1::2, 8:]
    y = add_act(view, b, a_scale=0.5, b_scale=0.25, out_scale=2.0)
    v = view.cpu().float() * 0.5 + b.cpu().float() * 0.25
    assert torch.equal(y.cpu(), reference.requantise(v * 2.0))


def test_ties_of_sums_go_to_even(device):
    x = torch.arange(-128, 128).to(INT8).view(4, 64)
    y = elementwise(x.to(device), x_scale=0.5)
    exact = x.double() / 2
    wanted = torch.where(exact % 1 == 0.5, 2 * (exact / 2).round(), exact)
    assert torch.equal(y.cpu().double(), wanted) and (exact % 1 == 0.5).sum() == 128


def test_only_8_bits_give_up_fused_arithmetic():
    x = torch.zeros(1, 4, 4, 16)
    assert elementwise_launch(x, x).fp_fusion
    assert not elementwise_launch(x, x.to(INT8)).fp_fusion
    assert not elementwise_launch(x.to(INT8), x).fp_fusion
    assert not global_avg_pool_launch(x.to(INT8), torch.zeros(1, 16)).fp_fusion


X = torch.zeros(1, 4, 4, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: elementwise(X, x_scale=2.0), "x_scale is 2.0, .* with no tensor of 8 bits"),
        (lambda: elementwise(X.to(INT8), x_scale=0.0), "x_scale is 0.0, expected a positive"),
        (lambda: elementwise(X.to(INT8), residual_scale=2.0), "2.0 with no residual"),
        (lambda: elementwise(X.to(torch.uint8)), "x has dtype torch.uint8, expected one of"),
        (
            lambda: elementwise(X.to(INT8), scale=torch.ones(16).half()),
            "scale has dtype torch.float16, expected torch.float32",
        ),
        (lambda: elementwise(X, residual=X.half()), "residual has dtype torch.float16"),
        (lambda: global_avg_pool(X, scale=2.0), "scale is 2.0, .* expected 1"),
        (lambda: global_avg_pool(X.to(INT8), scale=-2.0), "scale is -2.0, expected a positive"),
        (
            lambda: global_avg_pool(X.to(INT8), out=torch.zeros(1, 16).to(FP8)),
            "out has dtype torch.float8_e4m3fn, expected torch.int8 or",
        ),
        (
            lambda: avg_pool(X.to(INT8), kernel=(2, 2), stride=(2, 2)),
            "x has dtype torch.int8, expected one of",
        ),
        (
            lambda: max_pool(X.to(INT8), kernel=(2, 2), stride=(2, 2), out=X[:, :2, :2]),
            "out has dtype torch.float32, expected torch.int8",
        ),
        (lambda: linear(X[0, 0].to(INT8), X[0, 0].to(INT8)), "scale is missing"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
