"""The TensorRT backend: strongly typed ONNX in, an engine for one range of shapes out."""

from __future__ import annotations

import torch

from fastres.backends.base import CompiledParts, Refusal
from fastres.backends.shape_cache import Shapes
from fastres.backends.tensorrt.api import Api, find_api, find_builder
from fastres.backends.tensorrt.executable import TensorRtExecutable, architecture_of
from fastres.backends.tensorrt.stored import read_about
from fastres.calib.table import CalibrationTable
from fastres.errors import BackendUnavailable, UnsupportedError
from fastres.graph import onnx as onnx_form
from fastres.graph.ir import Graph
from fastres.graph.passes.quantise import quantise
from fastres.options import Options, Precision

_PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "fp16", "int8")


class TensorRtBackend:
    """fp32, tf32, fp16 and int8 on NVIDIA GPUs, by TensorRT or TensorRT for RTX."""

    name = "tensorrt"
    checked = True  # two builds of one network may differ in their numbers

    def unavailable(
        self, target: str | None = None, compiled: CompiledParts | None = None
    ) -> str | None:
        if target is not None:
            api = find_api(target)
            return api if isinstance(api, str) else _unbuildable(api, target)
        here = torch.cuda.is_available()
        own = architecture_of(torch.device("cuda", torch.cuda.current_device())) if here else ""
        api = _api_for(own, compiled)
        if isinstance(api, str):
            return api
        if not here:
            found = "there is no NVIDIA GPU (torch.cuda.is_available() is False)"
            advice = "; target='sm_86' builds an engine for one that is not here"
            return found + advice if compiled is None else found
        if api.is_rtx and api.architecture(own) is None:
            known = ", ".join(api.architectures)
            return f"{api} runs on {known}, and this GPU is {own}; pip install tensorrt"
        return None

    def precision(self, wanted: Precision) -> str | None:
        if wanted in _PRECISIONS:
            return None
        return f"tensorrt runs {', '.join(_PRECISIONS)}, not {wanted}"

    def quantise(self, graph: Graph, table: CalibrationTable, precision: Precision) -> Graph:
        return quantise(graph, table, "skip")

    def refusals(self, graph: Graph) -> tuple[Refusal, ...]:
        return tuple(Refusal(*refused) for refused in onnx_form.refusals(graph))

    def lower(
        self,
        graph: Graph,
        options: Options,
        shapes: Shapes,
        compiled: CompiledParts | None = None,
    ) -> TensorRtExecutable:
        target, device = options.target, self.device(options)
        architecture = target or architecture_of(device)
        api = _api_for(architecture, compiled) if target is None else find_api(target)
        if isinstance(api, str):
            raise BackendUnavailable(api)
        if api.is_rtx and architecture == "sm_75" and options.precision != "fp16":
            raise UnsupportedError(
                f"{api} multiplies in fp16 alone on sm_75 (Turing), {options.precision} was asked "
                "for: compile with precision='fp16' (--precision fp16), or, on a machine with such "
                "a GPU, pip install tensorrt and leave target out"
            )
        return TensorRtExecutable(api, graph, options, device, shapes, compiled)

    def device(self, options: Options) -> torch.device:
        if options.target is not None or not torch.cuda.is_available():
            return torch.device("cuda", 0)
        if options.device is not None and options.device.index is not None:
            return options.device
        return torch.device("cuda", torch.cuda.current_device())


def _api_for(architecture: str, compiled: CompiledParts | None) -> Api | str:
    """The module to use on a GPU: that which built the plan of a saved engine, if it is for it.

    Args:
        architecture: empty where there is no GPU.
    """
    about = None if compiled is None else read_about(compiled.files)
    usual = find_api()
    if about is None or architecture not in ("", about.origin.architecture):
        return usual
    builder = find_builder(about.origin.builder)
    return usual if isinstance(builder, str) and isinstance(usual, Api) else builder


def _unbuildable(api: Api, target: str) -> str | None:
    if api.architecture(target) is None:
        known = ", ".join(api.architectures)
        return (
            f"{api} builds for {known}, not for {target}; with such a GPU at hand, leave target "
            "out; backend='triton' builds for sm_90 and others, too"
        )
    return None
