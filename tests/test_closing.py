"""What an engine holds goes at once when it is closed or let go of: no collector is needed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastres

BACKENDS: dict[str, dict[str, Any]] = {
    "cpu": {"backend": "cpu"},
    "reference": {"backend": "reference"},
    "onnxruntime": {"backend": "onnxruntime"},
    "segments": {"backend": "cpu", "on_unsupported": "fallback"},
}


class Rolled(nn.Module):
    """A convolution and an operation that only PyTorch knows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(self.conv(x).relu(), 1, 3)


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("way", ["close", "del"])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_executable_goes_at_once(name: str, way: str) -> None:
    settings = BACKENDS[name]
    net = Rolled().eval() if name == "segments" else fastres.models.cifar_resnet(8, seed=0).eval()
    engine = fastres.compile(net, torch.zeros(2, 3, 16, 16), **settings)
    for n in (1, 2):
        engine(torch.zeros(n, 3, 16, 16))
    list(engine.map([torch.zeros(2, 3, 16, 16)] * 3))
    executable = weakref.ref(engine._lowered.executable)
    if way == "close":
        engine.close()
    else:
        del engine
    assert executable() is None
