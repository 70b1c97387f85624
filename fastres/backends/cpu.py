"""The CPU backend: Graph → ONNX → OpenVINO, specialised for every input shape it meets.

Static shapes beat a dynamic batch and cost a fraction of a second to compile, so each shape seen
gets a compiled model of its own; the least recently used is dropped when there are too many.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from fastres.backends.base import HERE_ONLY, Account, CompiledParts, NodeTime, Refusal
from fastres.backends.instructions import int8_instructions, sums_in_32_bits
from fastres.backends.openvino_runtime import PRECISIONS, core, cpu_config, openvino, refusing
from fastres.backends.reference import ReferenceExecutable
from fastres.backends.shape_cache import ShapeCache, Shapes
from fastres.calib.table import CalibrationTable
from fastres.deadlines import Deadline
from fastres.errors import GraphError, missing
from fastres.graph import onnx as onnx_form
from fastres.graph.ir import Graph, MaxPool, Node, Pad
from fastres.graph.onnx_writer import as_array
from fastres.graph.passes.halve_sums import halve_sums
from fastres.graph.passes.quantise import REDUCED, quantise
from fastres.graph.passes.thin_out import thin_out
from fastres.graph.shapes import infer_shapes
from fastres.options import Options, Precision, Sizes

_LARGEST = torch.finfo(torch.float32).max
_ROW = 8192  # numbers
_FEW = 1 << 18
_PASSES, _SECONDS = 5, 5.0  # of a profile, which has the medians; fewer where they take longer


class CpuBackend:
    """fp32 and int8 everywhere, bf16 where the processor has instructions for it."""

    name = "cpu"
    checked = False

    def unavailable(
        self, target: str | None = None, compiled: CompiledParts | None = None
    ) -> str | None:
        if target is not None:
            return HERE_ONLY
        try:
            openvino()
        except ImportError as error:
            return missing("openvino", error)
        return None

    def precision(self, wanted: Precision) -> str | None:
        if wanted == "bf16" and "BF16" not in core().get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        ):
            return "this processor has no bf16 instructions (AVX512_BF16 or AMX); use fp32"
        return None if wanted in PRECISIONS else f"cpu runs fp32, bf16 and int8, not {wanted}"

    def quantise(self, graph: Graph, table: CalibrationTable, precision: Precision) -> Graph:
        steps = None if sums_in_32_bits() else REDUCED
        return thin_out(quantise(graph, table, "both", weight_steps=steps, unsigned=True))

    def refusals(self, graph: Graph) -> tuple[Refusal, ...]:
        users = graph.users()
        reasons = (
            (node.name, onnx_form.refusal(node) or _lost(graph, node, users))
            for node in graph.nodes
        )
        return tuple(Refusal(name, reason) for name, reason in reasons if reason is not None)

    def lower(
        self,
        graph: Graph,
        options: Options,
        shapes: Shapes,
        compiled: CompiledParts | None = None,
    ) -> CpuExecutable:
        executable = CpuExecutable(graph, options)
        executable.prepare(shapes)
        return executable

    def device(self, options: Options) -> torch.device:
        return torch.device("cpu")


def _lost(graph: Graph, node: Node, users: Mapping[str, list[Node]]) -> str | None:
    """Why a Pad is refused: NaN and infinities that it brings in would be lost further on."""
    if not isinstance(node.op, Pad) or abs(node.op.value) <= _LARGEST:
        return None
    readers = users.get(node.name, [])
    if node.op.value == -math.inf and readers and node.name not in graph.outputs:
        if all(isinstance(reader.op, MaxPool) for reader in readers):
            return None  # never the largest
    return f"it pads with {node.op.value}, and OpenVINO's ReLU and max pool lose NaN and infinities"


def _read(graph: Graph) -> Any:
    """The graph as an OpenVINO model that reads the weights where they lie.

    The ONNX form carries no weights: as part of it they would be copied three times over.
    """
    proto = onnx_form.to_onnx(graph, for_openvino=True, weights_as_inputs=True)
    with refusing("read the network"):
        model = core().read_model(proto.SerializeToString())
    for parameter in model.get_parameters():
        name = parameter.friendly_name
        if name in graph.constants:
            array = as_array(graph.constants[name])
            constant = openvino().op.Constant(array, shared_memory=True)
            constant.friendly_name = name
            parameter.output(0).replace(constant.output(0))
            model.remove_parameter(parameter)
    with refusing("work out the network's shapes"):
        model.validate_nodes_and_infer_types()
    return model


class CpuExecutable:
    """One OpenVINO model, compiled once for each input shape."""

    def __init__(self, graph: Graph, options: Options) -> None:
        self._graph = graph
        self._options = options
        self._pictures = () if graph.normalize is None else graph.normalize.inputs
        precision = options.precision or "fp32"
        self._config = cpu_config(precision, options.hint, options.num_threads)
        self._reshaping = threading.Lock()
        self._model = _read(halve_sums(graph) if precision == "fp32" else graph)
        self._plans: ShapeCache[_Plan] = ShapeCache(options.cache_size)

    def prepare(self, shapes: Shapes) -> None:
        """Compiles for these input shapes now, so that the first call does not wait."""
        self._plans.get(shapes, self._compile)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        # Nothing here may be a parallel operation of PyTorch: its threads would then spin for 2 ms
        # on the cores that OpenVINO is about to use.
        given = onnx_form.inputs_for(self._graph, inputs)
        outputs = self._plans.get(_shapes(inputs), self._compile).run(given)
        if outputs is None:
            # OpenVINO's ReLU and max pool turn NaN into a number; PyTorch's keep it
            return ReferenceExecutable(self._graph, torch.float32).run(inputs)
        return outputs

    def run_until(self, inputs: Sequence[torch.Tensor], deadline: Deadline) -> list[torch.Tensor]:
        """As `run`. What is compiled for a new shape is made to its end, and kept."""
        given = onnx_form.inputs_for(self._graph, inputs)
        plan = self._plans.get(_shapes(inputs), self._compile)
        deadline.left()  # before a request is taken up
        outputs = plan.run(given, deadline)
        if outputs is None:
            return ReferenceExecutable(self._graph, torch.float32).run_until(inputs, deadline)
        return outputs

    def precisions(self) -> dict[str, str]:
        """Read off the compiled model: what each node was compiled to run in."""
        found = self._plans.latest().precisions()
        if self._graph.normalize is not None:  # what it reads is bytes, what it computes is not
            found[self._graph.normalize.name] = "fp32"
        return found

    def profile(self, inputs: Sequence[torch.Tensor]) -> list[NodeTime]:
        given = onnx_form.inputs_for(self._graph, inputs)
        return self._compile(_shapes(inputs), counters=True).profile(given)

    def account(self) -> Account:
        if self._options.precision != "int8":
            return Account()
        found = int8_instructions()
        note = f"int8 products by {found}"
        if not sums_in_32_bits():
            note += f": it sums pairs of them in 16 bits, so weights take {REDUCED} steps, not 127"
        return Account(notes=(note,))

    def compiled(self) -> CompiledParts:
        return CompiledParts()

    def _compile(self, shapes: Shapes, counters: bool = False) -> _Plan:
        given = {v.name: list(s) for v, s in zip(self._graph.inputs, shapes, strict=True)}
        for name in self._pictures:
            n, c, h, w = given[name]
            given[name] = [n, h, w, c]
        config = {**self._config, "PERF_COUNT": counters}
        what = f"compile the network for inputs {[list(shape) for shape in shapes]}"
        with self._reshaping, refusing(what):  # the one model is bent to each shape in turn
            self._model.reshape(given)
            compiled = core().compile_model(self._model, "CPU", config)
        sizes = infer_shapes(self._graph, shapes)
        for name, port in zip(self._graph.outputs, compiled.outputs, strict=True):
            if tuple(port.shape) != sizes[name]:  # it read an operation otherwise than PyTorch
                raise GraphError(
                    f"OpenVINO gives {name} the shape {list(port.shape)}, PyTorch "
                    f"{list(sizes[name])}: its numbers would be wrong. Use backend='reference', "
                    "and report the model"
                )
        return _Plan(compiled, [sizes[name] for name in self._graph.outputs])


class _GivenUp:
    """A request that was told to stop: until it has, the memory that it works on is kept."""

    def __init__(self, request: Any, memory: object) -> None:
        self._request, self._memory = request, memory

    def has_ended(self, milliseconds: int = 0) -> bool:
        try:
            return bool(self._request.wait_for(milliseconds))
        except RuntimeError:  # how it says that it was stopped
            return True

    def __del__(self) -> None:
        while not self.has_ended(1000):
            pass


class _Plan:
    """A model compiled for one shape, with as many infer requests as callers at a time."""

    def __init__(self, compiled: Any, output_shapes: Sequence[Sizes]) -> None:
        self._compiled = compiled
        self._output_shapes = output_shapes
        # handing memory over costs about 0.1 ms a call, as much as copying a mebibyte
        self._large = [i for i, s in enumerate(output_shapes) if 4 * math.prod(s) > 2**20]
        self._idle: deque[Any] = deque()
        self._given_up: deque[_GivenUp] = deque()

    def run(
        self, inputs: Sequence[torch.Tensor], deadline: Deadline | None = None
    ) -> list[torch.Tensor] | None:
        """The outputs, or None if an input may lead to NaN or infinities."""
        request = self._request()
        outputs = self._infer(request, inputs, deadline)
        self._idle.append(request)  # one that failed is not used again
        return outputs

    def _infer(
        self, request: Any, inputs: Sequence[torch.Tensor], deadline: Deadline | None = None
    ) -> list[torch.Tensor] | None:
        """Inputs are read where they lie; so are large outputs written, small ones copied.

        They are looked through first: while OpenVINO runs it would cost more, since its threads
        have a core each, and wait for the one that shares its core.
        """
        if not all(_is_ordinary(tensor) for tensor in inputs):
            return None
        tensor_of = openvino().Tensor
        for i, tensor in enumerate(inputs):
            request.set_input_tensor(i, tensor_of(tensor.numpy(), shared_memory=True))
        large = {  # whatever the caller's defaults are
            i: torch.empty(self._output_shapes[i], dtype=torch.float32, device="cpu")
            for i in self._large
        }
        for i, tensor in large.items():
            request.set_output_tensor(i, tensor_of(tensor.numpy(), shared_memory=True))
        if deadline is None:
            request.infer()
        else:
            self._infer_until(deadline, request, inputs, large)
        return [
            large[i] if i in large else torch.from_numpy(request.get_output_tensor(i).data.copy())
            for i in range(len(self._output_shapes))
        ]

    def _infer_until(self, deadline: Deadline, request: Any, *memory: object) -> None:
        """Where time runs out OpenVINO ends after the node under way, or when its turn comes."""
        left = deadline.left()
        request.start_async()
        if not request.wait_for(math.ceil(1e3 * left)):
            request.cancel()
            self._given_up.append(_GivenUp(request, memory))
            raise deadline.passed()

    def precisions(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for op in self._compiled.get_runtime_model().get_ops():
            info = op.rt_info
            if _text(info, "layerType") in ("Input", "Const", "Output"):
                continue
            names = {"f32": "fp32", "f16": "fp16", "u8": "int8", "i8": "int8"}
            name = names.get(_text(info, "runtimePrecision"))
            for origin in _origins(_text(info, "originalLayersNames")):
                found.setdefault(origin, name or _text(info, "runtimePrecision"))
        return found

    def profile(self, inputs: Sequence[torch.Tensor]) -> list[NodeTime]:
        kinds = {
            op.friendly_name: _origins(_text(op.rt_info, "originalLayersNames"))
            for op in self._compiled.get_runtime_model().get_ops()
        }
        request = self._request()
        self._infer(request, inputs)  # once to warm up
        passes: list[Any] = []
        until = time.perf_counter() + _SECONDS
        while not passes or (len(passes) < _PASSES and time.perf_counter() < until):
            self._infer(request, inputs)
            passes.append(request.profiling_info)
        times = []
        for same in zip(*passes, strict=True):
            spent = 1e3 * statistics.median(step.real_time.total_seconds() for step in same)
            if spent > 0:
                origins = kinds.get(same[0].node_name) or [same[0].node_name]
                times.append(NodeTime(origins[0], spent, same[0].exec_type))
        return times

    def _request(self) -> Any:
        for _ in range(len(self._given_up)):
            with suppress(IndexError):  # another caller was faster
                one = self._given_up.popleft()
                if not one.has_ended():
                    self._given_up.append(one)
        try:
            return self._idle.pop()
        except IndexError:
            return self._compiled.create_infer_request()


def _shapes(inputs: Sequence[torch.Tensor]) -> Shapes:
    return tuple(tuple(tensor.shape) for tensor in inputs)


def _is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether the sum of squares is a number in float32.

    It is not for NaN and infinities, nor for values that would sooner or later overflow inside a
    network. Many are summed row by row: BLAS would take threads for longer rows, which spin
    afterwards on the cores that OpenVINO needs.
    """
    if not tensor.is_floating_point():
        return True
    numbers = tensor.view(-1).numpy()
    if numbers.size <= _FEW:  # a single operation: each costs more than its work, in cold caches
        return bool(np.einsum("i,i", numbers, numbers) < math.inf)
    even = numbers.size // _ROW * _ROW
    rows, rest = numbers[:even].reshape(-1, _ROW), numbers[even:]
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.vecdot(rows, rows).sum() + np.vecdot(rest, rest) < math.inf)


def _text(info: Any, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""


def _origins(names: str) -> list[str]:
    """The graph nodes behind a comma-separated list of ONNX node names, first to last."""
    return list(dict.fromkeys(onnx_form.origin_of(n) for n in names.split(",") if n))
