"""The onnxruntime backend: an independent reading of our ONNX form, for cross-checks.

Nothing is optimised: every node runs as the file says, which is what makes it a witness, and slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastres.backends.base import HERE_ONLY, Account, CompiledParts, NodeTime, Refusal
from fastres.backends.shape_cache import Shapes
from fastres.calib.table import CalibrationTable
from fastres.errors import UnsupportedError, missing
from fastres.graph import onnx as onnx_form
from fastres.graph.ir import Graph
from fastres.graph.passes.quantise import quantise
from fastres.options import Options, Precision

_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")


class OnnxRuntimeBackend:
    """fp32, fp16 and int8 on the CPU, node by node."""

    name = "onnxruntime"
    checked = False

    def unavailable(
        self, target: str | None = None, compiled: CompiledParts | None = None
    ) -> str | None:
        if target is not None:
            return HERE_ONLY
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            return missing("onnxruntime", error)
        return None

    def precision(self, wanted: Precision) -> str | None:
        if wanted in _PRECISIONS:
            return None
        return f"onnxruntime runs {', '.join(_PRECISIONS)}, not {wanted}"

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
    ) -> OnnxRuntimeExecutable:
        return OnnxRuntimeExecutable(graph, options)

    def device(self, options: Options) -> torch.device:
        return torch.device("cpu")


class OnnxRuntimeExecutable:
    """One session, which takes any shape that the graph does."""

    def __init__(self, graph: Graph, options: Options) -> None:
        import onnxruntime

        half = options.precision in ("fp16", "int8")
        settings = onnxruntime.SessionOptions()
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.intra_op_num_threads = options.num_threads
        settings.log_severity_level = 4
        self._graph = graph
        self._precision = options.precision or "fp32"
        proto = onnx_form.to_bytes(graph, half=half)
        try:
            self._session: Any = onnxruntime.InferenceSession(
                proto, settings, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its own kinds
            raise UnsupportedError(f"onnxruntime cannot read the network: {error}") from error

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        arrays = (x.numpy() for x in onnx_form.inputs_for(self._graph, inputs))
        named = zip(self._graph.inputs, arrays, strict=True)
        given = {value.name: array for value, array in named}
        found = self._session.run(None, given)
        return [torch.from_numpy(array) for array in found]

    def precisions(self) -> dict[str, str]:
        whole = self._precision == "int8"
        floats = "fp16" if whole else self._precision
        return {
            node.name: "int8" if whole and "scale" in node.params else floats
            for node in self._graph.nodes
        }

    def profile(self, inputs: Sequence[torch.Tensor]) -> list[NodeTime]:
        raise UnsupportedError("onnxruntime is here to be compared with, not to be timed")

    def account(self) -> Account:
        return Account()

    def compiled(self) -> CompiledParts:
        return CompiledParts()
