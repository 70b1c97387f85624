"""A TensorRT engine on PyTorch's memory and streams: contexts, CUDA graphs, times of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fastres.backends.base import NodeTime
from fastres.backends.context_pool import ContextPool
from fastres.backends.shape_cache import ShapeCache, Shapes
from fastres.backends.tensorrt.api import Api
from fastres.backends.tensorrt.layers import from_inspector
from fastres.backends.tensorrt.plan import Layer
from fastres.errors import BackendUnavailable, OutOfMemory, UnsupportedError
from fastres.options import Sizes
from fastres.streams import current

Call = Callable[[], None]
Record = Callable[[Call], Call]


class Context:
    """An execution context for one set of shapes; one caller on one stream at a time uses it.

    Args:
        execution: TensorRT's, with its input shapes set.
    """

    def __init__(self, execution: Any) -> None:
        self.execution = execution
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self.replay: Call | None = None

    def memory(self) -> tuple[torch.Tensor, ...]:
        """What recorded work reads and writes; other work is given memory of its own each time."""
        return (*self.inputs, *self.outputs)


class TensorRtRunner:
    """One engine in this process; any number of threads may run it.

    Args:
        api: what the plan was built with.
        plan: trusted bytes: TensorRT runs whatever they hold.
        names: of inputs and outputs, in the graph's order.
        device: a GPU.
        record: makes one call of a context's work, as `timing.recorder` gives; None enqueues it
            anew each time.
        shape_limit: for how many sets of input shapes contexts are kept.

    Raises:
        BackendUnavailable: TensorRT does not take the plan on this GPU.
        UnsupportedError: the engine has other inputs and outputs than the graph.
    """

    def __init__(
        self,
        api: Api,
        plan: bytes,
        names: tuple[Sequence[str], Sequence[str]],
        device: torch.device,
        record: Record | None,
        shape_limit: int,
    ) -> None:
        self._device = device
        self._record = record
        self._inputs, self._outputs = names
        with current(device):
            self._log = api.module.Logger(api.module.Logger.ERROR)
            self._runtime = api.module.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BackendUnavailable(
                f"{api} does not take this engine on {device}: it was built by another version or "
                "for another GPU. Compile the model here"
            )
        there = {
            self._engine.get_tensor_name(i): self._engine.get_tensor_mode(
                self._engine.get_tensor_name(i)
            )
            for i in range(self._engine.num_io_tensors)
        }
        mode = api.module.TensorIOMode
        wanted = dict.fromkeys(self._inputs, mode.INPUT) | dict.fromkeys(self._outputs, mode.OUTPUT)
        if there != wanted:
            raise UnsupportedError(
                f"the engine has the tensors {sorted(there)}, the graph {sorted(wanted)}: it "
                "belongs to another network"
            )
        self._api = api
        self._pools: ShapeCache[ContextPool[Context]] = ShapeCache(shape_limit)

    def layers(self) -> tuple[Layer, ...]:
        """What the engine inspector says; () where it says nothing."""
        inspector = self._engine.create_engine_inspector()
        form = self._api.module.LayerInformationFormat.JSON
        return from_inspector(inspector.get_engine_information(form))

    def run(self, inputs: Sequence[torch.Tensor], shapes: Sequence[Sizes]) -> list[torch.Tensor]:
        """Outputs in memory of their own.

        Args:
            inputs: contiguous, on the engine's device, in its dtypes and within its ranges.
            shapes: of the outputs.
        """
        given = tuple(tuple(x.shape) for x in inputs)
        pool = self._pools.get(given, lambda _: ContextPool(self._device))
        with current(self._device), pool.context(lambda: self._new_context(given)) as context:
            if self._record is None:
                outputs = [self._empty(shape) for shape in shapes]
                self._bind(context, inputs, outputs)
                self._execute(context.execution)
                return outputs
            if context.replay is None:
                context.inputs = [torch.empty_like(x) for x in inputs]
                context.outputs = [self._empty(shape) for shape in shapes]
                self._bind(context, context.inputs, context.outputs)
                self._copy(context, inputs)
                context.replay = self._record(partial(self._execute, context.execution))
            self._copy(context, inputs)
            context.replay()
            return [output.clone() for output in context.outputs]

    def profile(
        self, inputs: Sequence[torch.Tensor], shapes: Sequence[Sizes], layers: Sequence[Layer]
    ) -> list[NodeTime]:
        """The time of each layer in one run, under the first node of ours that it computes."""
        spent: dict[str, float] = {}
        profiler = _profiler(self._api.module, spent)
        with current(self._device):
            context = self._new_context(tuple(tuple(x.shape) for x in inputs))
            outputs = [self._empty(shape) for shape in shapes]
            self._bind(context, inputs, outputs)
            self._execute(context.execution)  # once to warm up
            context.execution.profiler = profiler
            self._execute(context.execution)
            torch.cuda.current_stream(self._device).synchronize()
        nodes = {layer.name: layer.nodes for layer in layers}
        return [
            NodeTime(nodes[name][0] if nodes.get(name) else name, milliseconds, name)
            for name, milliseconds in spent.items()
        ]

    def _new_context(self, shapes: Shapes) -> Context:
        return Context(self._new_execution(shapes))

    def _new_execution(self, shapes: Shapes) -> Any:
        execution = self._engine.create_execution_context()
        if execution is None:
            sizes = ", ".join(str(list(shape)) for shape in shapes)
            raise OutOfMemory(
                f"TensorRT has no room on {self._device} for another execution context, for inputs "
                f"{sizes}: it takes what the engine's largest batch needs. Compile with a smaller "
                "max_batch_size, use fewer threads, or free memory on the device"
            )
        for name, shape in zip(self._inputs, shapes, strict=True):
            if not execution.set_input_shape(name, shape):
                raise UnsupportedError(f"the engine does not take {name} as {list(shape)}")
        return execution

    def _bind(
        self, context: Context, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> None:
        named = zip((*self._inputs, *self._outputs), (*inputs, *outputs), strict=True)
        for name, tensor in named:
            found = tuple(context.execution.get_tensor_shape(name))
            if found != tuple(tensor.shape):
                raise UnsupportedError(
                    f"the engine gives {name} the shape {list(found)}, expected "
                    f"{list(tensor.shape)}: it belongs to another network"
                )
            context.execution.set_tensor_address(name, tensor.data_ptr())

    def _execute(self, execution: Any) -> None:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        if not execution.execute_async_v3(stream):
            raise UnsupportedError("TensorRT could not run the engine; its log says why")

    def _copy(self, context: Context, inputs: Sequence[torch.Tensor]) -> None:
        for static, given in zip(context.inputs, inputs, strict=True):
            static.copy_(given)

    def _empty(self, shape: Sizes) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self._device)


def _profiler(trt: Any, spent: dict[str, float]) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, name: str, milliseconds: float) -> None:
            spent[name] = spent.get(name, 0.0) + milliseconds

    return Profiler()
