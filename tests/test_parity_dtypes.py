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
