"""The networks that engines are built of here, calibrated for int8, and what was built of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

import fastres
from fastres import models
from fastres.assembly.assemble import optimised
from fastres.backends.tensorrt.api import Api, find_api
from fastres.backends.tensorrt.build import build
from fastres.backends.tensorrt.plan import Built, Range
from fastres.errors import CaptureError
from fastres.graph.ir import Graph
from fastres.graph.onnx import to_onnx
from fastres.graph.passes.quantise import quantise
from fastres.quantization.calibrate import collect
from fastres.source import source_of

TARGET = "sm_86"
NETS: dict[str, Callable[[], torch.nn.Module]] = {
    "resnet18": lambda: models.resnet18(seed=0),
    "resnet50 v1": lambda: models.resnet50(version="v1", seed=0),
    "resnet50 v1.5": lambda: models.resnet50(version="v1.5", seed=0),
    "cifar resnet20": lambda: models.cifar_resnet(20, seed=0),
    "resnext50": lambda: models.resnext50_32x4d(seed=0),
    "dilated resnet50": lambda: models.resnet50(
        seed=0, replace_stride_with_dilation=(False, True, True)
    ),
}


@pytest.fixture(scope="session")
def rtx() -> Api:
    """tensorrt_rtx, which the dev extra installs; it builds without a GPU."""
    found = find_api(TARGET)
    assert isinstance(found, Api), found
    return found


@pytest.fixture(scope="session")
def graph_of() -> Callable[[str, str], Graph]:
    """graph_of("resnet18", "int8"): optimised; in int8 by the ranges of one random picture."""
    return _graph


@pytest.fixture(scope="session")
def built() -> Callable[[str, str], Built]:
    """built("resnet18", "int8"): its engine, for batches of up to 32."""
    return _built


@cache
def _graph(net: str, precision: str) -> Graph:
    size = 32 if net.startswith("cifar") else 224
    if precision != "int8":
        model = NETS[net]().eval()
        return optimised(source_of(model, fastres.Input((1, 3, size, size))).graph, CaptureError)
    graph = _graph(net, "fp32")
    one = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    table = collect(graph, [fastres.Input((1, 3, size, size))], [(one,)], "minmax")
    return quantise(graph, table, "skip")


@cache
def _built(net: str, precision: str) -> Built:
    graph, api = _graph(net, "int8" if precision == "int8" else "fp32"), find_api(TARGET)
    assert isinstance(api, Api), api
    size = 32 if net.startswith("cifar") else 224
    shapes = Range((1, 3, size, size), (8, 3, size, size), (32, 3, size, size))
    proto = to_onnx(graph, half=precision != "fp32").SerializeToString()
    return build(api, proto, {graph.inputs[0].name: shapes}, target=TARGET)
