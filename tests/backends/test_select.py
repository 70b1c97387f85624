"""The choice of a backend, and that every refusal is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.backends.onnx_runtime import OnnxRuntimeBackend
from fastres.backends.select import choose, order
from fastres.errors import BackendUnavailable, InputError, UnsupportedError
from fastres.options import Options
from fastres.source import source_of

IMAGE = fastres.Input((2, 3, 16, 16))


class Rolled(nn.Module):
    """conv, roll, conv, roll, conv: two operations that only PyTorch knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(self.a(x).relu(), 1, 3)
        return self.c(torch.roll(self.b(x), 2, 2))


def test_auto_order() -> None:
    on_gpu = torch.cuda.is_available()
    assert order(["auto"], None) == (("triton",) if on_gpu else ("cpu",))
    assert order(["auto"], torch.device("cpu")) == ("cpu",)
    assert order(["auto"], torch.device("cuda")) == ("triton",)
    assert order(["reference", "auto"], torch.device("cpu")) == ("reference", "cpu")


def test_unknown_backend() -> None:
    with pytest.raises(
        InputError,
        match="backend is 'tpu'; there are auto, cpu, triton, tensorrt, ",
    ):
        fastres.compile(Rolled().eval(), IMAGE, backend="tpu")


def test_precision_that_no_backend_takes() -> None:
    with pytest.raises(UnsupportedError, match="cpu runs fp32, bf16 and int8, not fp16") as caught:
        fastres.compile(Rolled().eval(), IMAGE, backend="cpu", precision="fp16")
    assert "fallback" not in str(caught.value)  # it could not help
    with pytest.raises(UnsupportedError, match="reference computes in .* and fp8, not bf16"):
        fastres.compile(Rolled().eval(), IMAGE, backend="reference", precision="bf16")


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:0", "the GPU is sm_75; the kernels need"), ("cuda:2", "'cuda:2', and PyTorch sees 2")],
)
def test_the_gpu_that_was_asked_for_is_looked_at(
    gpus: Any, monkeypatch: pytest.MonkeyPatch, device: str, message: str, current: int
) -> None:
    """Whichever is the current one; the second would do."""
    gpus.now = current
    kinds = [(7, 5), (9, 0)]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device=None: kinds[gpus.index(device)]
    )

    def chosen(device: str) -> str:
        graph = source_of(Rolled().eval(), IMAGE).graph
        options = Options(
            backend=("triton",), device=torch.device(device), on_unsupported="fallback"
        )
        return choose(graph, options, "fp16").backend.name

    assert chosen("cuda:1") == "triton"
    with pytest.raises(BackendUnavailable, match=message):
        chosen(device)


def test_device_that_the_backend_does_not_have() -> None:
    with pytest.raises(UnsupportedError, match="cpu runs on cpu, device='cuda' was") as caught:
        fastres.compile(Rolled().eval(), IMAGE, backend="cpu", device="cuda")
    assert "fallback" not in str(caught.value)
    with pytest.raises(InputError, match="device 'gpu' is not one"):
        fastres.compile(Rolled().eval(), IMAGE, device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_triton_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable, match="there is no NVIDIA GPU"):
        fastres.compile(Rolled().eval(), IMAGE, backend="triton")


def test_refused_nodes_are_all_listed() -> None:
    with pytest.raises(UnsupportedError) as caught:
        fastres.compile(Rolled().eval(), IMAGE, backend="cpu")
    text = str(caught.value)
    assert "cpu refuses 2 of 5 nodes" in text and "on_unsupported='fallback'" in text
    assert "roll: " in text and "roll_1: " in text


def test_for_another_machine_there_is_no_fallback() -> None:
    with pytest.raises(UnsupportedError, match="refuses 2 of 5 nodes") as caught:
        fastres.compile(Rolled().eval(), IMAGE, backend="triton", target="sm_90")
    assert "fallback" not in str(caught.value)


class TestRefusedWhileLowering:
    """What a backend sees only then sends the network to the next of the list, too."""

    @pytest.fixture(autouse=True)
    def odd(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def lower(*given: object) -> object:
            raise UnsupportedError("a weight is too odd")

        monkeypatch.setattr(OnnxRuntimeBackend, "lower", lower)

    def test_the_next_takes_it(self) -> None:
        net = nn.Conv2d(3, 4, 3).eval()
        engine = fastres.compile(net, IMAGE, backend=["onnxruntime", "reference"])
        assert engine.backend.name == "reference"
        (reason,) = engine.info.passed_over
        assert reason == "onnxruntime refuses the network: a weight is too odd"

    def test_all_reasons_are_told(self) -> None:
        net = nn.Conv2d(3, 4, 3).eval()
        with pytest.raises(UnsupportedError, match="^a weight is too odd$"):
            fastres.compile(net, IMAGE, backend="onnxruntime")
        with pytest.raises(UnsupportedError, match=r"(?s)too odd\ncpu refuses the precision"):
            fastres.compile(net, IMAGE, backend=["onnxruntime", "cpu"], precision="fp16")


def test_list_of_backends_tells_what_was_passed_over() -> None:
    engine = fastres.compile(Rolled().eval(), IMAGE, backend=["cpu", "reference"])
    assert engine.backend.name == "reference"
    assert "cpu refuses 2 of 5 nodes" in engine.info.passed_over[0]
    assert "passed over: cpu refuses" in str(engine.info)


def test_fallback_runs_refused_nodes_in_pytorch_and_says_so() -> None:
    model = Rolled().eval()
    x = torch.randn(3, 3, 16, 16)
    engine = fastres.compile(model, IMAGE, backend="cpu", on_unsupported="fallback")
    with torch.no_grad():
        assert torch.allclose(engine(x), model(x), atol=1e-5)
    assert engine(x[:0]).shape == (0, 2, 14, 14)
    info = engine.info
    assert [node.name for node in info.fallbacks] == ["roll", "roll_1"]
    assert {node.backend for node in info.fallbacks} == {"pytorch"}
    assert all(node.reason for node in info.fallbacks)
    assert "fallback roll: " in str(info)
    assert {row.name for row in engine.profile(x).rows} >= {"a", "roll", "b", "roll_1", "c"}
