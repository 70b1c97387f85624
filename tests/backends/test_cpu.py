"""The CPU backend: precisions, shapes, every operation that it takes, and its reports."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastres
from fastres.backends import cpu
from fastres.backends.cpu import CpuExecutable
from fastres.errors import CaptureError, GraphError, UnsupportedError
from fastres.options import Options
from fastres.tolerances import errors

PhotoBatch = Callable[[int, int], Tensor]


class Function(nn.Module):
    """A function as a network; a 3x3 convolution before it, so that there are weights."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.linear = nn.Linear(9, 5)
        self.norm = nn.BatchNorm2d(6)
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.uniform_(0.5, 1.5)
            self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.conv(x))


@dataclass(frozen=True)
class Case:
    """One operation as a user would write it."""

    name: str
    function: Callable[[Function, Tensor], Tensor]


CASES = (
    Case("relu", lambda m, x: F.relu(x)),
    Case("silu", lambda m, x: F.silu(x)),
    Case("silu_alone", lambda m, x: F.silu(F.max_pool2d(x, 2))),
    Case("sigmoid", lambda m, x: torch.sigmoid(x)),
    Case("gelu", lambda m, x: F.gelu(x)),
    Case("hardswish", lambda m, x: F.hardswish(x)),
    Case("add", lambda m, x: F.relu(F.max_pool2d(x, 3, 1, 1) + x)),
    Case("add_itself", lambda m, x: x + x),
    Case("add_broadcast", lambda m, x: x + x.mean((2, 3), keepdim=True)),
    Case("mul_broadcast", lambda m, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True))),
    Case("max_pool", lambda m, x: F.max_pool2d(x, 3, 2, 1)),
    Case("max_pool_ceil", lambda m, x: F.max_pool2d(x, 3, 2, ceil_mode=True)),
    Case("max_pool_ceil_pad", lambda m, x: F.max_pool2d(x, 3, 3, 1, ceil_mode=True)),
    Case("max_pool_ceil_exact", lambda m, x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True)),
    Case("max_pool_ceil_stride_1", lambda m, x: F.max_pool2d(x, 2, 1, 1, ceil_mode=True)),
    Case("max_pool_dilated", lambda m, x: F.max_pool2d(x, 2, 1, 0, 2)),
    Case("avg_pool", lambda m, x: F.avg_pool2d(x, 3, 2, 1)),
    Case("avg_pool_ceil", lambda m, x: F.avg_pool2d(x, 2, 2, ceil_mode=True)),
    Case("avg_pool_ceil_pad", lambda m, x: F.avg_pool2d(x, 3, 3, 1, ceil_mode=True)),
    Case("avg_pool_ceil_exact", lambda m, x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)),
    Case("avg_pool_no_pad", lambda m, x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    Case("global_pool", lambda m, x: F.adaptive_avg_pool2d(x, 1)),
    Case("mean", lambda m, x: x.mean((2, 3))),
    Case("flatten", lambda m, x: x.flatten(1)),
    Case("flatten_from_2", lambda m, x: x.flatten(2)),
    Case("linear_4d", lambda m, x: F.relu(m.linear(x))),
    Case("concat", lambda m, x: torch.cat([x, F.relu(x), x], 1)),
    Case("pad", lambda m, x: F.pad(x, (1, 2, 0, 3, 2, 1), value=0.5)),
    Case("slice", lambda m, x: x[:, 1:5:2, ::2, 3:]),
    Case("softmax", lambda m, x: x.softmax(1)),
    Case("batch_norm_alone", lambda m, x: F.relu(m.norm(F.max_pool2d(x, 2)))),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_operation(case: Case) -> None:
    model = Function(case.function).eval()
    x = torch.randn(2, 3, 11, 9, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model.double()(x.double())
        model.float()
    with fastres.compile(model, x, backend="cpu", on_unsupported="fallback") as engine:
        # where ONNX rounds its windows otherwise than PyTorch, the node is refused
        assert bool(engine.info.fallbacks) == case.name.endswith("_ceil_pad")
        got = engine(x)
    assert errors(got, want).rms < 1e-6, case.name


@pytest.mark.usefixtures("bf16")
def test_bf16_runs_in_bf16_and_info_says_so(photo_batch: PhotoBatch) -> None:
    model = fastres.models.settle(fastres.models.resnet18(seed=0), photo_batch(8, 64))
    x = photo_batch(2, 64)
    with fastres.compile(model, x, precision="bf16", backend="cpu") as engine:
        ran = [node.precision for node in engine.info.nodes if node.op == "conv2d"]
        assert set(ran) == {"bf16"} and len(ran) == 20
        assert engine(x).dtype == torch.float32
    with fastres.compile(model, x, backend="cpu") as engine:
        assert {n.precision for n in engine.info.nodes if n.op == "conv2d"} == {"fp32"}


@pytest.mark.usefixtures("bf16")
def test_bf16_model_keeps_its_dtype(photo_batch: PhotoBatch) -> None:
    model = fastres.models.settle(fastres.models.cifar_resnet(20), photo_batch(8, 32)).bfloat16()
    x = photo_batch(2, 32).bfloat16()
    with fastres.compile(model, x, backend="cpu") as engine:
        assert engine.options.precision == "bf16"
        y = engine(x)
        assert y.dtype == torch.bfloat16
        fastres.verify(model, engine, [x]).raise_if_failed()


def test_float64_model_runs_in_fp32_and_returns_float64(photo_batch: PhotoBatch) -> None:
    model = fastres.models.settle(fastres.models.cifar_resnet(20), photo_batch(8, 32)).double()
    x = photo_batch(2, 32).double()
    with fastres.compile(model, x, backend="cpu") as engine, torch.no_grad():
        y = engine(x)
        assert y.dtype == torch.float64 and torch.allclose(y, model(x), atol=1e-4)


def test_plans_are_bounded_and_shapes_come_back(photo_batch: PhotoBatch) -> None:
    model = fastres.models.cifar_resnet(20).eval()
    with fastres.compile(model, fastres.Input((1, 3, 32, 32)), backend="cpu") as engine:
        executable = engine._lowered.executable
        assert isinstance(executable, CpuExecutable)
        x = photo_batch(12, 32)
        first = [engine(x[:n]) for n in range(1, 13)]
        assert len(executable._plans) == Options().cache_size
        again = [engine(x[:n]) for n in range(1, 13)]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_infinite_inputs_mean_what_they_mean_in_pytorch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    x = torch.randn(2, 3, 8, 8)
    x[1, 0, 2, 2] = float("inf")
    x[0, 1, 3, 3] = float("-inf")
    with fastres.compile(model, x, backend="cpu") as engine, torch.no_grad():
        want = model(x)
        assert torch.equal(torch.isinf(engine(x)), torch.isinf(want))
        assert torch.allclose(engine(x), want, equal_nan=True, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e39])
def test_padding_that_openvino_would_lose_runs_in_pytorch(value: float) -> None:
    model = Function(lambda m, x: F.relu(F.pad(m.conv2(x), (1, 1, 1, 1), value=value))).eval()
    model.conv2 = nn.Conv2d(6, 2, 1).eval()
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(UnsupportedError, match="it pads with"):
        fastres.compile(model, x, backend="cpu")
    if value != 1e39:  # PyTorch refuses that one
        with (
            fastres.compile(model, x, backend="cpu", on_unsupported="fallback") as engine,
            torch.no_grad(),
        ):
            assert torch.allclose(engine(x), model(x), equal_nan=True, atol=1e-5)


def test_padding_that_is_never_the_largest() -> None:
    model = Function(
        lambda m, x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 3, 2)
    ).eval()
    x = torch.randn(1, 3, 8, 8)
    with fastres.compile(model, x, backend="cpu") as engine, torch.no_grad():
        assert torch.allclose(engine(x), model(x), atol=1e-5)


def test_the_callers_defaults_change_nothing() -> None:
    model = nn.Conv2d(3, 32, 3, padding=1).eval()
    x = torch.randn(4, 3, 64, 64)
    with fastres.compile(model, x, backend="cpu") as engine:
        want = engine(x)
        with torch.device("meta"):
            assert torch.equal(engine(x), want)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(engine(x), want)
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(engine(x), want)
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_shape_that_openvino_sees_otherwise_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = cpu.infer_shapes
    monkeypatch.setattr(
        cpu,
        "infer_shapes",
        lambda graph, shapes: {
            name: (*size[:-1], size[-1] + 1) for name, size in honest(graph, shapes).items()
        },
    )
    with pytest.raises(
        GraphError, match=r"OpenVINO gives conv2d the shape \[1, 4, 6, 6\], PyTorch"
    ):
        fastres.compile(nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 8, 8), backend="cpu")


@pytest.mark.parametrize(
    ("layer", "kind", "reason"),
    [
        (
            nn.Conv2d(3, 4, 3, padding=10**6),
            UnsupportedError,
            "Failed to allocate 128001792006272 bytes of memory",
        ),
        (nn.MaxPool2d(2, stride=2**40), CaptureError, "it must be from 1 to 2147483647"),
    ],
    ids=["memory", "a stride that would crash it"],
)
def test_what_openvino_cannot_do_is_a_refusal(
    layer: nn.Module, kind: type[Exception], reason: str
) -> None:
    model = nn.Sequential(layer).eval()
    with pytest.raises(kind, match=re.escape(reason)) as caught:
        fastres.compile(model, fastres.Input((2, 3, 16, 16)), backend="cpu")
    assert ".cpp" not in str(caught.value)


@pytest.mark.parametrize(("seconds", "passes"), [(60.0, 5), (0.0, 1)], ids=["short", "long"])
def test_a_profile_has_fewer_passes_where_they_are_long(
    seconds: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_SECONDS", seconds)
    x = torch.zeros(1, 3, 8, 8)
    with fastres.compile(nn.Conv2d(3, 4, 3).eval(), x, backend="cpu") as engine:
        runs: list[object] = []
        infer = cpu._Plan._infer
        monkeypatch.setattr(
            cpu._Plan, "_infer", lambda plan, *given: (runs.append(plan), infer(plan, *given))[1]
        )
        assert engine.profile(x).rows and len(runs) == 1 + passes  # the first one warms up
