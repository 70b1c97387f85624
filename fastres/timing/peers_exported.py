"""The runtimes that take a network in a form of their own: OpenVINO, ONNX Runtime, TensorRT."""

from __future__ import annotations

import importlib
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastres.assembly.assemble import optimised
from fastres.backends.cpu import CpuBackend
from fastres.backends.openvino_runtime import core, cpu_config, openvino
from fastres.compiler import compile
from fastres.errors import BackendUnavailable, CaptureError, InputError, UnsupportedError, missing
from fastres.graph.capture import capture
from fastres.graph.onnx import refusals, to_onnx
from fastres.graph.passes.drop_dead import drop_dead
from fastres.graph.passes.fold_constants import fold_constants
from fastres.options import Input, Precision
from fastres.timing.setting import Run, Setting, by_shape


def openvino_direct(setting: Setting) -> Run:
    """OpenVINO, given the network by its own converter, one stream.

    Raises:
        BackendUnavailable: the package is missing.
        UnsupportedError: this processor has no such precision.
    """
    ov = _import("openvino")
    if (why := CpuBackend().precision(setting.precision)) is not None:
        raise UnsupportedError(f"openvino: {why}")
    config = cpu_config(setting.precision, "latency", setting.threads)

    def specialise(x: Tensor) -> Run:
        with warnings.catch_warnings(), torch.no_grad():
            # OpenVINO 2026.4 still traces, which PyTorch calls deprecated, each version in its way
            warnings.filterwarnings("ignore", "`torch.jit")
            model = ov.convert_model(setting.model, example_input=x, input=[tuple(x.shape)])
        return _request(core().compile_model(model, "CPU", config))

    return by_shape(specialise)


def nncf(setting: Setting) -> Run:
    """OpenVINO's own int8: quantised by NNCF's post-training quantisation, one stream.

    Raises:
        BackendUnavailable: a package is missing.
    """
    network = onnx_bytes(setting.model, setting.example, folded=True)
    # int8: what NNCF leaves runs in float32, and not in bf16 where OpenVINO would like to
    return in_openvino(nncf_quantised(network, _images(setting)), "int8", setting.threads)


def onnxruntime(setting: Setting) -> Run:
    """ONNX Runtime with all of its optimisations; int8 by its own static quantisation.

    Raises:
        BackendUnavailable: the package is missing.
        UnsupportedError: the network has no ONNX form here.
    """
    _import("onnxruntime")
    if setting.precision == "int8":
        network = onnx_bytes(setting.model, setting.example, folded=True)
        quantised = ort_quantised(network, _images(setting))
        return by_shape(lambda x: OrtSession(quantised, setting.threads, {"N": len(x)}))
    return by_shape(
        lambda x: OrtSession(onnx_bytes(setting.model, x), setting.threads, {"N": len(x)})
    )


def tensorrt(setting: Setting) -> Run:
    """TensorRT, given the network by our lowering: `backend="tensorrt"`.

    Raises:
        BackendUnavailable: no GPU, or no TensorRT.
    """
    more = {"calibration": [_images(setting)]} if setting.precision == "int8" else {}
    engine = compile(
        setting.model,
        setting.example,
        backend="tensorrt",
        precision=setting.precision,
        device=setting.example.device,
        **more,  # type: ignore[arg-type]
    )
    return engine


def onnx_bytes(model: nn.Module, example: Tensor, *, folded: bool = False) -> bytes:
    """The network as ONNX with a free batch.

    Args:
        folded: whether BatchNorms are folded first, as quantisers want them to be.

    Raises:
        UnsupportedError: an operation has no ONNX form here.
    """
    graph = capture(model, (Input(tuple(example.shape)),)).graph
    # what is computed of weights alone is no runtime's work, and may have no ONNX form
    graph = optimised(graph, CaptureError) if folded else drop_dead(fold_constants(graph))
    if refused := refusals(graph):
        said = "; ".join(f"{name}: {why}" for name, why in refused)
        raise UnsupportedError(f"there is no ONNX form of {said}")
    return bytes(to_onnx(graph).SerializeToString())


def nncf_quantised(network: bytes, images: Tensor) -> Any:
    """OpenVINO's model of an ONNX network, quantised by NNCF as it chooses for this processor."""
    package = _import("nncf")
    package.set_log_level(40)
    whole = core().read_model(network)
    with _quiet():
        return package.quantize(
            whole,
            package.Dataset([x[None].numpy() for x in images]),
            subset_size=len(images),
            target_device=package.TargetDevice.CPU,
        )


def ort_quantised(network: bytes, images: Tensor) -> bytes:
    """An ONNX network by ONNX Runtime's static quantisation: Q/DQ, int8, weights per channel.

    Activations have zero points of their own, as by default: with symmetric ones every ReLU stays a
    node of floats between two pairs.
    """
    package = _import("onnxruntime.quantization")

    class Reader(package.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.left: Iterator[Tensor] = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            x = next(self.left, None)
            return None if x is None else {name: x[None].numpy()}

    name = OrtSession(network, 1).input
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        before.write_bytes(network)
        with _quiet():
            package.quantize_static(
                str(before),
                str(after),
                Reader(),
                per_channel=True,
                activation_type=package.QuantType.QInt8,
                weight_type=package.QuantType.QInt8,
            )
        return after.read_bytes()


class OrtSession:
    """An ONNX network in ONNX Runtime on the CPU, to be called with one batch.

    Args:
        sizes: of free dimensions, by name, where they are known beforehand.
    """

    def __init__(
        self, network: bytes, threads: int, sizes: Mapping[str, int] | None = None
    ) -> None:
        ort = _import("onnxruntime")
        settings = ort.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        for name, size in (sizes or {}).items():
            settings.add_free_dimension_override_by_name(name, size)
        self._session = ort.InferenceSession(network, settings, providers=["CPUExecutionProvider"])
        self.input: str = self._session.get_inputs()[0].name

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(
            self._session.run(None, {self.input: x.detach().contiguous().numpy()})[0]
        )


def in_openvino(model: Any, precision: Precision, threads: int) -> Run:
    """OpenVINO's model of a network on the CPU, one stream, compiled for each shape it meets."""
    config = cpu_config(precision, "latency", threads)

    def specialise(x: Tensor) -> Run:
        model.reshape(list(x.shape))
        return _request(core().compile_model(model, "CPU", config))

    return by_shape(specialise)


def _request(compiled: Any) -> Run:
    ov, request = openvino(), compiled.create_infer_request()

    def run(x: Tensor) -> Tensor:
        array = x.detach().contiguous().numpy()
        request.set_input_tensor(0, ov.Tensor(array, shared_memory=True))
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


def _images(setting: Setting) -> Tensor:
    if setting.images is None:
        raise InputError("int8 needs images to calibrate with; give some")
    return setting.images.cpu()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and notes that quantisers print."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _import(package: str) -> Any:
    try:
        return openvino() if package == "openvino" else importlib.import_module(package)
    except ImportError as error:
        raise BackendUnavailable(missing(package.partition(".")[0], error)) from error
