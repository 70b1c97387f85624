"""fastres.export: what is written means, in two other runtimes, what the graph means here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fastres
from fastres import models
from fastres.assembly.assemble import optimised
from fastres.backends.openvino_runtime import core
from fastres.backends.reference import ReferenceExecutable
from fastres.errors import CaptureError, InputError, UnsupportedError
from fastres.graph import onnx as onnx_form
from fastres.graph.ir import Graph, Quantize
from fastres.graph.passes.quantise import quantise
from fastres.source import source_of
from fastres.tolerances import Distance, errors

pytestmark = pytest.mark.usefixtures("one_thread")
PICTURES = fastres.Preprocess()
HALF, FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


@pytest.fixture(scope="module")
def small(images: Tensor) -> nn.Module:
    """Basic blocks whose shortcuts are strided slices with zero channels."""
    net = models.cifar_resnet(8, shortcut="A", num_classes=7, seed=0)
    return models.settle(net, images)


@pytest.fixture(scope="module")
def table(net: nn.Module, images: Tensor) -> fastres.CalibrationTable:
    return fastres.quantize(net, images, algorithm="mse")


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"net.onnx"


def in_onnxruntime(path: Path, x: Tensor) -> Tensor:
    """Node by node as the file says: nothing fused, nothing moved."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def in_openvino(path: Path, x: Tensor) -> Tensor:
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core().compile_model(str(path), "CPU", config)
    return torch.from_numpy(np.array(compiled(x.numpy())[0]))


RUNTIMES = pytest.mark.parametrize("run", [in_onnxruntime, in_openvino])


def meaning(graph: Graph, x: Tensor) -> Tensor:
    return ReferenceExecutable(graph, torch.float32).run([x])[0]


def kinds(path: Path) -> dict[str, int]:
    """Tensor types of the initializers that convolutions and linear layers read."""
    graph = onnx.load(path).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    layers = (node for node in graph.node if node.op_type in ("Conv", "Gemm"))
    return {node.name: types.get(node.input[1], -1) for node in layers}


@RUNTIMES
@pytest.mark.parametrize("which", ["net", "small"])
def test_fp32(
    run: Callable[[Path, Tensor], Tensor],
    which: str,
    images: Tensor,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    model = request.getfixturevalue(which)
    fastres.export(model, tmp_path / "net.onnx", inputs=images[:1])
    onnx.checker.check_model(str(tmp_path / "net.onnx"), full_check=True)
    exact = model.double()(images.double())
    model.float()
    found = errors(run(tmp_path / "net.onnx", images), exact)
    assert found.within(errors(model(images), exact), torch.float32)


def test_fp16(net: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """Float16 from the first cast to the last; what it costs is what it costs in PyTorch."""
    path = tmp_path / "net.onnx"
    fastres.export(net, path, inputs=images[:1], precision="fp16")
    onnx.checker.check_model(str(path), full_check=True)
    assert set(kinds(path).values()) == {HALF}
    proto = onnx.load(path)
    ends = [*proto.graph.input, *proto.graph.output]
    assert {value.type.tensor_type.elem_type for value in ends} == {FLOAT}
    assert [node.op_type for node in proto.graph.node].count("Cast") == 2
    exact = net.double()(images.double())
    usual = net.half()(images.half())
    net.float()
    assert errors(in_onnxruntime(path, images), exact).within(errors(usual, exact), torch.float16)


@RUNTIMES
@pytest.mark.parametrize("placement", ["tensorrt", "openvino"])
@pytest.mark.parametrize("which", ["net", "small"])
def test_int8_is_our_quantised_graph(
    run: Callable[[Path, Tensor], Tensor],
    placement: Any,
    which: str,
    images: Tensor,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """A value on the edge between two steps may fall to either side: no more than that.

    OpenVINO takes the second pair of its own placement as leave to fuse, and does not round there,
    only clips; with minmax thresholds nothing is clipped.
    """
    model = request.getfixturevalue(which)
    table, path = fastres.quantize(model, images, algorithm="minmax"), tmp_path / "net.onnx"
    graph = fastres.export(model, path, inputs=images[:1], calibration=table, placement=placement)
    onnx.checker.check_model(str(path), full_check=True)
    meant = graph
    if placement == "openvino" and run is in_openvino:
        plain_graph = optimised(source_of(model, images[:1]).graph, CaptureError)
        meant = quantise(plain_graph, table, "skip", unsigned=True)
    wanted, plain = meaning(meant, images), model(images)
    between, cost = Distance(), Distance()
    between.add(run(path, images), wanted.double())
    cost.add(wanted, plain.double())
    assert between.sqnr_db > cost.sqnr_db + 6  # half of what quantising costs, or less
    operations = [node.op_type for node in onnx.load(path).graph.node]
    pairs = sum(isinstance(node.op, Quantize) for node in graph.nodes)
    assert operations.count("QuantizeLinear") == pairs > 0


def test_placements_differ_in_what_they_round(
    net: nn.Module, images: Tensor, table: fastres.CalibrationTable, tmp_path: Path
) -> None:
    counts, points = {}, {}
    for placement in ("tensorrt", "openvino"):
        path = tmp_path / placement
        fastres.export(net, path, inputs=images[:1], calibration=table, placement=placement)  # type: ignore[arg-type]
        proto = onnx.load(path)
        counts[placement] = sum(node.op_type == "QuantizeLinear" for node in proto.graph.node)
        points[placement] = {
            t.data_type for t in proto.graph.initializer if t.name.endswith("/zero")
        }
    assert counts["openvino"] == counts["tensorrt"] + 4  # one for each block
    assert points["tensorrt"] == {onnx.TensorProto.INT8}
    assert points["openvino"] == {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}


class Returns(nn.Module):
    """One value twice, and what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.c(x)
        return y, x, y


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_outputs_differ_from_inputs_and_one_another(tmp_path: Path, precision: Any) -> None:
    net, x, path = Returns().eval(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx"
    fastres.export(net, path, inputs=x, precision=precision)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for got, want in zip(session.run(None, {"x": x.numpy()}), net(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-2, atol=1e-2)


def test_a_network_that_no_onnx_model_holds(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_form, "LIMIT", 1000)
    with pytest.raises(UnsupportedError, match="holds up to 1000"):
        fastres.export(net, tmp_path / "net.onnx")
    with pytest.raises(UnsupportedError, match="holds up to 1000"):
        fastres.compile(net, backend="tensorrt", target="sm_86")


@RUNTIMES
def test_layers_that_stay_are_float16(
    run: Callable[[Path, Tensor], Tensor], net: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    table = fastres.quantize(net, images, algorithm="minmax", ignored=["conv1", "layer3.*", "fc"])
    path = tmp_path / "net.onnx"
    graph = fastres.export(net, path, inputs=images[:1], calibration=table)
    onnx.checker.check_model(str(path), full_check=True)
    found = kinds(path)
    assert {name for name, kind in found.items() if kind == HALF} == set(table.keep)
    assert {kind for name, kind in found.items() if name not in table.keep} == {-1}
    exact, ran, meant = net.double()(images.double()), Distance(), Distance()
    net.float()
    ran.add(run(path, images), exact)
    meant.add(meaning(graph, images), exact)
    assert ran.sqnr_db > meant.sqnr_db - 3  # float16 moves some values over an edge
    two = Distance()
    two.add(in_openvino(path, images), in_onnxruntime(path, images).double())
    assert two.sqnr_db > 60


def test_batch_and_size_are_free(small: nn.Module, tmp_path: Path) -> None:
    ranged = fastres.Input(((1, 3, 32, 32), (1, 3, 32, 32), (8, 3, 48, 48)))
    path = tmp_path / "net.onnx"
    fastres.export(small, path, inputs=ranged)
    for n, h, w in ((1, 32, 32), (3, 40, 36)):
        x = torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(n))
        torch.testing.assert_close(in_onnxruntime(path, x), small(x), rtol=1e-3, atol=1e-3)


def test_pictures_are_normalised_in_the_file(
    net: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    path, preprocess = tmp_path / "net.onnx", fastres.Preprocess()
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    fastres.export(
        net,
        path,
        inputs=images[:1],
        precision="fp16",
        preprocess=preprocess,
        io_dtype=torch.uint8,
    )
    mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
    x = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    wanted = net(x)
    torch.testing.assert_close(in_onnxruntime(path, pixels), wanted, rtol=0.02, atol=0.02)


def test_the_same_model_gives_the_same_bytes(
    net: nn.Module, images: Tensor, table: fastres.CalibrationTable, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        fastres.export(net, tmp_path / name, inputs=images[:1], calibration=table)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


class Shuffled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pixel_shuffle(x, 2)


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"precision": "bf16"}, InputError, "written in fp32, fp16 and int8"),
        ({"precision": "int8"}, InputError, "needs calibration="),
        ({"precision": "fp16", "calibration": "table"}, InputError, "leave one out"),
        ({"placement": "both"}, InputError, "there are tensorrt and openvino"),
        ({"path": 3}, InputError, "path is int"),
        ({"path": ""}, InputError, "path is empty"),
        ({"path": "a\0b"}, InputError, "cannot be written: embedded null"),
        ({"path": "."}, InputError, "cannot be written"),
        ({"path": "missing/net.onnx"}, InputError, "cannot be written"),
        ({"model": Shuffled().eval()}, UnsupportedError, "1 of 1 nodes"),
        ({"io_dtype": torch.uint8}, InputError, "say how"),
        ({"io_dtype": torch.float16}, InputError, "io_dtype is torch.float16; give torch.uint8"),
        ({"io_dtype": torch.float16, "preprocess": PICTURES}, InputError, "give torch.uint8"),
        ({"io_dtype": "uint8", "preprocess": PICTURES}, InputError, "io_dtype is 'uint8'"),
        ({"io_dtype": torch.uint8, "preprocess": 3}, InputError, "preprocess is 3; give"),
        ({"preprocess": "x"}, InputError, "preprocess is 'x'; give"),
        ({"preprocess": PICTURES}, InputError, "give both, or neither"),
        ({"precision": np.zeros(2)}, InputError, "precision is array"),
        ({"placement": np.zeros(2)}, InputError, "placement is array"),
        ({"path": BytesPath()}, InputError, "path is BytesPath"),
    ],
)
def test_bad_arguments_leave_no_file(
    given: dict[str, Any],
    kind: type[Exception],
    text: str,
    net: nn.Module,
    images: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = torch.randn(1, 4, 8, 8) if "model" in given else images[:1]
    arguments = {"model": net, "path": "net.onnx", "inputs": inputs, **given}
    with pytest.raises(kind, match=text):
        fastres.export(**arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", [None, "onnxruntime", "tensorrt"])
@pytest.mark.parametrize(
    ("slot", "said"), [("fc.weight", "fc: its weight,"), ("fc.bias", "fc: its bias,")]
)
def test_what_float16_cannot_hold_is_refused(
    slot: str, said: str, backend: str | None, images: Tensor, tmp_path: Path
) -> None:
    """A bias that became infinite gave infinite logits, and nothing said so."""
    model = models.cifar_resnet(8, seed=0).eval()
    with torch.no_grad():
        model.get_parameter(slot).view(-1)[0] = -1e5
    x = images[:1]
    with pytest.raises(UnsupportedError, match=f"{said}.* up to 1e\\+05 .*65504; use precision"):
        if backend is None:
            fastres.export(model, tmp_path / "net.onnx", inputs=x, precision="fp16")
        else:
            target = "sm_86" if backend == "tensorrt" else None
            fastres.compile(model, x, backend=backend, precision="fp16", target=target)
    fastres.export(model, tmp_path / "net.onnx", inputs=x)


def test_a_folded_batchnorm_is_looked_at(images: Tensor, tmp_path: Path) -> None:
    model = models.cifar_resnet(8, seed=0).eval()
    with torch.no_grad():
        model.layer3[0].bn2.bias[3] = 7e4
    with pytest.raises(UnsupportedError, match=r"layer3\.0\.conv2: its bias, with BatchNorm"):
        fastres.export(model, tmp_path / "net.onnx", inputs=images[:1], precision="fp16")


def test_int8_leaves_what_float16_cannot_hold(images: Tensor, tmp_path: Path) -> None:
    """Layers that a table keeps out of int8 are written in float16."""
    net = models.settle(models.cifar_resnet(8, seed=0), images)
    with torch.no_grad():
        net.fc.bias[0] = 1e6
    kept = fastres.quantize(net, images, algorithm="mse", ignored=["fc"])
    with pytest.raises(UnsupportedError, match="fc: its bias.*65504"):
        fastres.export(net, tmp_path / "net.onnx", inputs=images[:1], calibration=kept)
    table = fastres.quantize(net, images, algorithm="mse")
    fastres.export(net, tmp_path / "net.onnx", inputs=images[:1], calibration=table)
    assert in_onnxruntime(tmp_path / "net.onnx", images[:1]).isfinite().all()
