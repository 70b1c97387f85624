"""A saved plan's machine code run through the CUDA driver with NumPy: no PyTorch, no Triton."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec
import numpy as np
import safetensors.numpy

from fastres.artifact.manifest import GRAPH, WEIGHTS
from fastres.backends.parts import read_part
from fastres.backends.tensorrt.plan import Range
from fastres.backends.triton.running.linked import LinkedLaunch, LinkedPlan, values
from fastres.backends.triton.shipping.stored_kernels import CODE, KERNELS, MachineCode, read_code
from fastres.deploy.plans import (
    ELEMENTS,
    MARGIN,
    Graph,
    Place,
    Plan,
    Plans,
    check_inputs,
    check_linked,
)
from fastres.deploy.weights import PLAIN, PackedArrays, bf16, tf32
from fastres.errors import ArtifactError, BackendUnavailable, InputError, OutOfMemory
from fastres.kernels.compiled.binary import KernelBinary, KernelHeader, pack
from fastres.kernels.compiled.device_memory import DeviceMemory, Stream
from fastres.kernels.compiled.driver import (
    DriverModule,
    DriverUnavailable,
    encode_tensor_map,
    launch,
    use_device,
)
from fastres.kernels.compiled.tensor_map import TensorMap

Array = np.ndarray[Any, np.dtype[Any]]
PLANS = "compiled_triton_plans.json"
FILES = (KERNELS, CODE, PLANS, GRAPH, WEIGHTS)


class Gpu(Protocol):
    """What an engine asks of a GPU; tests put a fake in its place."""

    def allocate(self, size: int) -> int:
        """The address of so many zeros, which stay as long as this."""

    def write(self, address: int, array: Array) -> None:
        """Brings an array in, before what is launched next."""

    def read(self, array: Array, address: int) -> None:
        """Brings memory out, after what was launched; there after `wait`."""

    def wait(self) -> None:
        """Until all is done."""

    def encode(self, tensor: TensorMap) -> bytes:
        """A tensor map's 128 bytes."""

    def launch(self, kernel: int, arguments: Sequence[bytes], programs: int) -> None:
        """Launches a kernel by its number."""


class CudaGpu:
    """A real one.

    Raises:
        DriverUnavailable: cuda-bindings, the driver or the GPU is missing.
    """

    def __init__(self, kernels: Sequence[KernelBinary], device: int) -> None:
        use_device(device)
        self._device = device
        self._modules = [DriverModule(kernel) for kernel in kernels]
        self._headers = [kernel.header for kernel in kernels]
        self._stream = Stream(device)
        self._memory: list[DeviceMemory] = []

    def allocate(self, size: int) -> int:
        self._memory.append(DeviceMemory(size, self._device))
        return self._memory[-1].address

    def write(self, address: int, array: Array) -> None:
        self._stream.write(address, array)

    def read(self, array: Array, address: int) -> None:
        self._stream.read(array, address)

    def wait(self) -> None:
        self._stream.wait()

    def encode(self, tensor: TensorMap) -> bytes:
        return encode_tensor_map(tensor)

    def launch(self, kernel: int, arguments: Sequence[bytes], programs: int) -> None:
        function = self._modules[kernel].function(self._device)
        launch(self._headers[kernel], function, arguments, programs, self._stream.address)


def load_triton(files: Mapping[str, bytes], precision: str, device: int) -> TritonEngine:
    """An engine of a saved engine's files, which are sound and trusted.

    Raises:
        ArtifactError: there is no machine code, or the files contradict each other.
        BackendUnavailable: the driver or the GPU is missing, or the code is for another one.
    """
    code = read_code(files)
    if code is None:
        raise ArtifactError("the engine brings no machine code: compile it with target=")
    if PLANS not in files:
        raise ArtifactError(f"{PLANS} is missing. Copy the engine anew")
    plans = read_part(PLANS, files[PLANS], Plans).plans
    try:
        graph = msgspec.json.decode(files[GRAPH], type=Graph).graph
        tensors = safetensors.numpy.load(files[WEIGHTS])
    except KeyError as error:
        raise ArtifactError(
            f"{WEIGHTS} holds {error}, a type that NumPy has not: compile the model in float32"
        ) from error
    except Exception as error:  # safetensors raises its own kinds
        raise ArtifactError(f"the engine cannot be read: {error}") from error

    def constant(name: str) -> Array:
        if name not in graph.constants or graph.constants[name].stored not in tensors:
            raise ArtifactError(f"the plan reads {name}, which the engine has not")
        found: Array = tensors[graph.constants[name].stored]
        return found

    with _telling("take up the engine"):
        gpu = CudaGpu(list(code.kernels.values()), device)
        return TritonEngine(code, plans, constant, precision, gpu)


@contextmanager
def _telling(task: str) -> Iterator[None]:
    """The driver's errors as ours."""
    try:
        yield
    except DriverUnavailable as error:
        raise BackendUnavailable(str(error)) from error
    except RuntimeError as error:
        kind = OutOfMemory if "OUT_OF_MEMORY" in str(error) else BackendUnavailable
        raise kind(f"the GPU could not {task}: {error}") from error


class TritonEngine:
    """Machine code with its weights on one GPU; several threads may call it, one at a time runs.

    Args:
        code: kernels, and the launches of plans.
        plans: what lies where, for the same shapes.
        constant: a weight of the graph by its name.
        precision: of the plans.
    """

    def __init__(
        self,
        code: MachineCode,
        plans: Sequence[Plan],
        constant: Callable[[str], Array],
        precision: str,
        gpu: Gpu,
    ) -> None:
        self._gpu = gpu
        self._headers = [binary.header for binary in code.kernels.values()]
        self._running = threading.Lock()
        packed = PackedArrays(constant, precision)
        weights: dict[Any, tuple[int, int]] = {}  # by key: address and size
        for linked in code.plans:
            for key in linked.keys():
                if key not in weights:
                    array = packed.get(key)
                    weights[key] = gpu.allocate(array.nbytes), array.nbytes
                    gpu.write(weights[key][0], array)
                    gpu.wait()
        by_shapes = {plan.input_shapes: plan for plan in plans}
        if any(linked.input_shapes not in by_shapes for linked in code.plans) or not code.plans:
            raise ArtifactError(f"{KERNELS} and {PLANS} are of different plans")
        self._plans = [
            _Runner(by_shapes[linked.input_shapes], linked, self._headers, weights, gpu)
            for linked in sorted(code.plans, key=lambda plan: plan.input_shapes)
        ]

    @property
    def ranges(self) -> dict[str, Range]:
        """Of the plan for the largest batch."""
        return self._plans[-1].ranges

    def __call__(self, *inputs: Array) -> Array | tuple[Array, ...]:
        """Runs the engine: float32 [N, C, H, W], or pictures uint8 [N, H, W, 3], as compiled.

        Raises:
            InputError: inputs that fit no plan.
            OutOfMemory, BackendUnavailable: the GPU has no room for them, or failed.
        """
        for plan in self._plans:
            if plan.takes(inputs):
                with self._running, _telling("run the engine"):
                    outputs = plan.run(inputs)
                return outputs[0] if len(outputs) == 1 else tuple(outputs)
        found = [
            f"{x.dtype}{list(x.shape)}" if type(x) in PLAIN else type(x).__name__ for x in inputs
        ]
        raise InputError(
            f"inputs are {', '.join(found) or 'none'}; the engine takes "
            f"{'; or '.join(str(plan) for plan in self._plans)}, and fewer images"
        )


class _Runner:
    """One plan with its memory, its launches packed."""

    def __init__(
        self,
        plan: Plan,
        linked: LinkedPlan,
        headers: Sequence[KernelHeader],
        weights: Mapping[Any, tuple[int, int]],
        gpu: Gpu,
    ) -> None:
        self._plan = plan
        self._gpu = gpu
        self._headers = headers
        self._addresses = {key: address for key, (address, _) in weights.items()}
        numbers = [i for i, step in enumerate(plan.steps) if step.type == "LoadInput"]
        self._loads = [plan.steps[i] for i in numbers]
        check_linked(linked, plan, headers, weights)
        check_inputs(plan, self._loads)
        self._arena = gpu.allocate(plan.arena_bytes)
        self._pixels = [
            gpu.allocate(math.prod(shape)) if step.normalize else 0
            for step, shape in zip(self._loads, plan.input_shapes, strict=True)
        ]
        first = {number: i for i, number in enumerate(numbers)}
        self._bring_in = {
            first[x.step]: (x.kernel, self._packed(x, self._pixels[first[x.step]]), x.programs)
            for x in linked.launches
            if x.step in first
        }
        if any(step.normalize and i not in self._bring_in for i, step in enumerate(self._loads)):
            raise ArtifactError(f"{KERNELS} has no launch that brings the pictures in")
        self._launches = [
            (x.kernel, self._packed(x), x.programs) for x in linked.launches if x.step not in first
        ]

    def __str__(self) -> str:
        return ", ".join(
            f"{'uint8' if step.normalize else 'float32'}{list(shapes.largest)}"
            for step, shapes in zip(self._loads, self.ranges.values(), strict=True)
        )

    @property
    def ranges(self) -> dict[str, Range]:
        """By input: 1 to as many images as the plan is for; of pictures as they are decoded."""
        found = {}
        for step, shape in zip(self._loads, self._plan.input_shapes, strict=True):
            if step.normalize:
                n, c, h, w = shape
                shape = (n, h, w, c)
            found[step.source] = Range((1, *shape[1:]), shape, shape)
        return found

    def takes(self, inputs: Sequence[Any]) -> bool:
        ranges = list(self.ranges.values())
        return len(inputs) == len(ranges) and all(
            type(x) in PLAIN
            and x.dtype == (np.uint8 if step.normalize else np.float32)
            and shapes.holds(x.shape)
            and len(x) == len(inputs[0])
            for x, shapes, step in zip(inputs, ranges, self._loads, strict=True)
        )

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        held = [self._load(i, x) for i, x in enumerate(inputs)]  # until all is copied
        for kernel, arguments, programs in self._launches:
            self._gpu.launch(kernel, arguments, programs)
        found = []
        for name, shape in self._plan.outputs:
            place = self._plan.places[name]
            array = np.empty(place.shape, ELEMENTS[place.dtype])
            self._gpu.read(array, self._arena + place.offset)
            found.append((array, place.dtype, shape))
        self._gpu.wait()
        del held
        return [_as_returned(*each)[: len(inputs[0])] for each in found]

    def _load(self, number: int, x: Array) -> Array:
        step = self._loads[number]
        place = self._plan.places[step.target]
        if step.normalize is None:
            array = as_stored(x, place, folded=step.folded, scale=step.scale)
            self._gpu.write(self._arena + place.offset, array)
            return array
        pixels = np.ascontiguousarray(x[..., ::-1] if step.normalize.flip else x)
        self._gpu.write(self._pixels[number], pixels)
        kernel, arguments, programs = self._bring_in[number]
        # the grid is pictures times tiles of one, and the plan may be for more pictures
        self._gpu.launch(kernel, arguments, programs // place.shape[0] * len(pixels))
        return pixels

    def _packed(self, x: LinkedLaunch, pictures: int = 0) -> list[bytes]:
        given = values(x, self._arena, self._addresses, pictures)
        try:
            return pack(self._headers[x.kernel], given, encode=self._gpu.encode)
        except ValueError as error:
            raise ArtifactError(f"a launch is not what its kernel takes: {error}") from error


def as_stored(x: Array, place: Place, *, folded: bool, scale: float | None) -> Array:
    """An input as kernels read it: NHWC or folded, in the plan's type, rounded once.

    Args:
        x: float32, [N, C, H, W] or [N, C].
        scale: of int8: what one step stands for.
    """
    if scale is not None:
        x = np.rint(x * (np.float32(1) / np.float32(scale))).clip(-128, 127)
    if folded:
        n, c, h, w = x.shape
        whole = np.zeros((n, *place.shape[1:]), np.float32)
        pixels = x.reshape(n, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5)
        rows, columns = (slice(MARGIN[0], MARGIN[0] + size // 2) for size in (h, w))
        whole[:, rows, columns, : 4 * c] = pixels.reshape(n, h // 2, w // 2, 4 * c)
    else:
        whole = x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
    if place.dtype == "bfloat16":
        return np.ascontiguousarray(bf16(whole))
    if place.tf32:
        return np.ascontiguousarray(tf32(whole))
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN, as anywhere
        return np.ascontiguousarray(whole.astype(ELEMENTS[place.dtype]))


def _as_returned(array: Array, dtype: str, shape: Sequence[int]) -> Array:
    """In float32 and NCHW."""
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    is_map = array.ndim == 4 and len(shape) == 4
    whole = array.transpose(0, 3, 1, 2) if is_map else array.reshape(shape)
    return np.ascontiguousarray(whole, np.float32)
