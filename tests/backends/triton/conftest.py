"""Engines built for an sm_90 that is not here, and a driver that launches nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres.backends.triton.planning.plan import Plan
from fastres.backends.triton.shipping.stored import recorded
from fastres.backends.triton.shipping.stored_kernels import MachineCode, read_code
from fastres.calib.table import CalibrationTable
from fastres.graph.capture import capture
from fastres.graph.ir import Graph
from fastres.graph.passes.pipeline import optimise
from fastres.graph.passes.quantise import quantise
from fastres.kernels.compiled.binary import KernelBinary
from fastres.kernels.compiled.tensor_map import TensorMap
from fastres.quantization.calibrate import collect


class FakeDriver:
    """Writes down what is launched; a tensor map's bytes are a digest of what it says."""

    def __init__(self, kernels: Sequence[KernelBinary], device: torch.device | None = None) -> None:
        self.headers = tuple(kernel.header for kernel in kernels)
        self.launched: list[tuple[str, int, list[bytes]]] = []

    def encode(self, tensor: TensorMap) -> bytes:
        return hashlib.sha512(repr(tensor).encode()).digest() * 2

    def launch(self, kernel: int, arguments: Sequence[bytes], programs: int) -> None:
        self.launched.append((self.headers[kernel].kernel, programs, list(arguments)))


Quantised = Callable[[nn.Module, Tensor], tuple[Graph, CalibrationTable]]


class Saved(NamedTuple):
    """An engine built for sm_90 in fp16, and what it would save."""

    engine: fastres.Engine
    plan: Plan
    code: MachineCode

    @property
    def files(self) -> dict[str, bytes]:
        return self.engine.compiled_parts().files


@pytest.fixture(scope="session")
def fake_driver() -> type[FakeDriver]:
    return FakeDriver


@pytest.fixture(scope="session")
def quantised() -> Quantised:
    """quantised(model, images): its graph, every layer in int8, and the table it has them from."""

    def make(model: nn.Module, images: Tensor) -> tuple[Graph, CalibrationTable]:
        inputs = (fastres.Input((1, *images.shape[1:])),)
        graph = optimise(capture(model, inputs).graph)
        table = collect(graph, inputs, [(images,)], "mse")
        return quantise(graph, table, "skip"), table

    return make


@pytest.fixture(scope="session")
def cifar() -> Saved:
    """For a batch of 2 at 16 pixels."""
    net = fastres.models.cifar_resnet(8, seed=0).eval()
    shape = fastres.Input((2, 3, 16, 16))
    return _saved(fastres.compile(net, shape, target="sm_90", precision="fp16"))


@pytest.fixture(scope="session")
def bottleneck() -> Saved:
    """Boxes, a merged projection, a split depth and a chain; a batch that no box divides."""
    net = fastres.models.ResNet(
        fastres.models.Bottleneck, (2, 1, 1, 1), version="v1.5", num_classes=16, planes=16, seed=0
    )
    shape = fastres.Input((3, 3, 32, 32))
    return _saved(fastres.compile(net.eval(), shape, target="sm_90", precision="fp16"))


def _saved(engine: fastres.Engine) -> Saved:
    files = engine.compiled_parts().files
    (plan,) = recorded(files, "sm_90").values()
    code = read_code(files)
    assert code is not None
    return Saved(engine, plan, code)
