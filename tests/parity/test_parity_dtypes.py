"""fastres.verify where a model names dtypes itself: bytes in, float32 islands, mixed outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.backends.cpu import CpuBackend
from fastres.graph.capture import capture
from fastres.graph.ir import Graph
from fastres.options import PRECISION_OF, Input

PRECISIONS = ["fp32", "bf16"] if CpuBackend().precision("bf16") is None else ["fp32"]


class Bytes(nn.Module):
    """Takes bytes and scales them itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x.float() / 255)))


class Island(nn.Module):
    """Returns its logits in its own dtype and probabilities in float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.fc(torch.relu(self.conv(x)).mean((2, 3)))
        return {"p": y.float().softmax(1), "logits": y}


@pytest.mark.parametrize("precision", [None, *PRECISIONS])
def test_bytes_in(precision: str | None) -> None:
    model, x = Bytes().eval(), torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    with fastres.compile(
        model, x, backend="cpu", precision=precision, on_unsupported="fallback", verify=True
    ) as engine:
        assert engine.options.precision == (precision or "fp32")
        assert engine(x).dtype == torch.float32
        report = fastres.verify(model, engine, [x], layerwise=True)
        assert report.passed and len(report.layers) == len(engine.graph.nodes)


@pytest.mark.parametrize("precision", [None, *PRECISIONS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_outputs_of_two_dtypes(dtype: torch.dtype, precision: str | None) -> None:
    if precision is None and PRECISION_OF[dtype] not in PRECISIONS:
        pytest.skip("this processor has no bf16 instructions")
    model, x = Island().to(dtype).eval(), torch.randn(4, 3, 8, 8).to(dtype)
    with fastres.compile(
        model, x, backend="cpu", precision=precision, on_unsupported="fallback"
    ) as engine:
        got = engine(x)
        assert got["p"].dtype == torch.float32 and got["logits"].dtype == dtype
        fastres.verify(model, engine, [x]).raise_if_failed()


def test_a_dtype_that_is_not_the_models_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Island().bfloat16().eval(), torch.randn(4, 3, 8, 8).bfloat16()
    with fastres.compile(model, x, backend="reference", precision="fp32") as engine:
        called = type(engine).__call__
        monkeypatch.setattr(
            type(engine),
            "__call__",
            lambda self, *inputs: {k: v.float() for k, v in called(self, *inputs).items()},
        )
        report = fastres.verify(model, engine, [x])
    failed = [row for row in report.outputs if not row.passed]
    assert [row.reason for row in failed] == ["dtype torch.float32, expected torch.bfloat16"]


def test_a_graph_means_the_same_in_float64() -> None:
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    graph: Graph = capture(Bytes().eval(), [Input((1, 3, 8, 8), dtype=torch.uint8)]).graph
    assert graph.floating_dtype == torch.float32
    with fastres.compile(graph, backend="reference") as engine:
        fastres.verify(graph, engine, [x]).raise_if_failed()


class Literal(nn.Module):
    """Computes with tensors that it makes, and in float32 only with scales of its own."""

    def __init__(self, what: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.what = nn.Conv2d(3, 4, 3), what
        self.register_buffer("scale", torch.full((4,), 0.01))
        self.register_buffer("zero", torch.zeros(4, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        match self.what:
            case "ones":
                return nn.functional.conv2d(y, torch.ones(4, 1, 3, 3), groups=4)
            case "a list":
                return nn.functional.prelu(y, torch.tensor([0.1]))
            case "a range":
                return y.mean((2, 3)) @ torch.linspace(0, 1, 4)
            case "an identity":
                return nn.functional.linear(y.mean((2, 3)), torch.eye(4))
            case "like another":
                return y * torch.full_like(y, 0.1)
        weight = torch.fake_quantize_per_channel_affine(
            self.conv.weight, self.scale, self.zero, 0, -128, 127
        )
        return nn.functional.conv2d(x, weight)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize(
    "what", ["ones", "a list", "a range", "an identity", "like another", "fake quantisation"]
)
def test_tensors_that_a_forward_makes(what: str, layerwise: bool) -> None:
    model, x = Literal(what).eval(), torch.randn(2, 3, 8, 8)
    with fastres.compile(model, x, backend="reference", verify=True) as engine:
        report = fastres.verify(model, engine, [x], layerwise=layerwise)
    assert report.passed, str(report)


class Mixed(nn.Module):
    """One layer in bf16, and a gate in fp16, of a network in float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Parameter(torch.rand(1).half())
        self.first, self.last = nn.Conv2d(3, 4, 3).bfloat16(), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.bfloat16()).float()) * self.gate.float()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_model_of_several_dtypes_runs_in_the_widest(backend: str) -> None:
    model, x = Mixed().eval(), torch.randn(2, 3, 8, 8)
    with fastres.compile(model, x, backend=backend, on_unsupported="fallback") as engine:
        assert engine.options.precision == "fp32"
        assert fastres.verify(model, engine, [x]).passed
        assert engine(x).dtype == torch.float32
