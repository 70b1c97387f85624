"""fastres.deploy: a saved engine run with NumPy, without PyTorch.

TensorRT's plans run through pycuda, machine code of the triton backend through cuda-bindings.

    engine = fastres.deploy.load("engine.fastres", trust_engine=True)
    logits = engine(images)  # NumPy arrays in, NumPy arrays out

Nothing is built or rebuilt here: the plan in the file must be of this GPU and of the TensorRT that
is installed. `fastres.load` (with PyTorch) builds it anew where it is not.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from fastres.artifact.container import MANIFEST, Container, defect, open_container, place
from fastres.artifact.manifest import FileEntry, check_files, checked, known_manifest, naming
from fastres.backends.tensorrt.api import Api, find_builder
from fastres.backends.tensorrt.plan import Range
from fastres.backends.tensorrt.stored import ABOUT, PLAN, Origin, read_plan
from fastres.backends.triton.shipping.stored_kernels import KERNELS
from fastres.deploy.weights import PLAIN
from fastres.errors import BackendUnavailable, InputError, OutOfMemory

if TYPE_CHECKING:
    from fastres.deploy.triton import TritonEngine

Array = np.ndarray[Any, np.dtype[Any]]


def load(
    path: str | os.PathLike[str], *, trust_engine: bool = False, device: int = 0
) -> DeployedEngine | TritonEngine:
    """Loads a saved engine: of backend="tensorrt", or of triton with machine code (`target=`).

    Args:
        path: folder or file.
        trust_engine: must be True: what the file holds is run as it is.
        device: number of the GPU.

    Raises:
        ArtifactError: the engine is damaged, holds nothing to run, or is not trusted.
        BackendUnavailable: pycuda and TensorRT, or for triton cuda-bindings, or the GPU is missing,
            or what the file holds is for others.
        InputError: `trust_engine` or `device` is out of range.
    """
    if not isinstance(trust_engine, bool):
        raise InputError(f"trust_engine is {trust_engine!r}; give True or False")
    if isinstance(device, bool) or not isinstance(device, int) or device < 0:
        raise InputError(f"device is {device!r}; give the number of a GPU, from 0 on")
    container = open_container(place(path))
    manifest = _manifest(container)
    files = _files(container, manifest, (ABOUT, PLAN))
    with naming(container.path):
        stored = read_plan(files)
    if stored is None and KERNELS not in manifest.files:
        raise defect(
            container.path,
            "it holds neither a TensorRT plan nor machine code: compile the model with "
            "backend='tensorrt' or target=, or load it with fastres.load, which takes PyTorch",
        )
    if not trust_engine:
        raise defect(
            container.path,
            "what it holds is run as it is: where you trust the file, pass trust_engine=True",
        )
    if stored is None:
        from fastres.deploy.triton import FILES, load_triton

        files = _files(container, manifest, FILES)
        with naming(container.path):
            return load_triton(files, manifest.options.precision, device)
    origin, built = stored
    api = find_builder(origin.builder)
    if isinstance(api, str):
        raise BackendUnavailable(api)
    return DeployedEngine(api, built.plan, origin, device)


class DeployedEngine:
    """A plan on one GPU; several threads may call it, one at a time runs."""

    def __init__(self, api: Api, plan: bytes, origin: Origin, device: int) -> None:
        self._cuda = _driver()
        self._device = device
        with self._telling("take up the engine"):
            self._context = _context(self._cuda, device, origin)
        self.ranges = {name: Range(*shapes) for name, shapes in origin.ranges.items()}
        self._running = threading.Lock()
        with self._in_context("take up the engine"):
            self._log = api.module.Logger(api.module.Logger.ERROR)
            self._runtime = api.module.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise BackendUnavailable(f"{api} does not take this engine on GPU {device}")
            self._execution = self._engine.create_execution_context()
            if self._execution is None:
                raise OutOfMemory(f"TensorRT has no room on GPU {device} for this engine")
            self._stream = self._cuda.Stream()
            names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
            self._dtypes = {
                name: np.dtype(api.module.nptype(self._engine.get_tensor_dtype(name)))
                for name in names
            }
            self._outputs = [name for name in names if name not in self.ranges]

    def __call__(self, *inputs: Array) -> Array | tuple[Array, ...]:
        """Runs the engine.

        Args:
            inputs: in the engine's order, of its dtypes and within `ranges`.

        Returns:
            The output, or all of several, in memory of their own.

        Raises:
            InputError: inputs that do not fit.
            OutOfMemory: the GPU has no room for them.
            BackendUnavailable: the GPU failed.
        """
        given = self._checked(inputs)
        with self._running, self._in_context("run the engine"):
            outputs = self._run(given)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @contextmanager
    def _in_context(self, task: str) -> Iterator[None]:
        with self._telling(task):
            self._context.push()
            try:
                yield
            finally:
                self._context.pop()

    @contextmanager
    def _telling(self, task: str) -> Iterator[None]:
        """pycuda's errors as ours."""
        try:
            yield
        except self._cuda.MemoryError as error:
            raise OutOfMemory(f"GPU {self._device} has no room to {task}: {error}") from error
        except self._cuda.Error as error:
            raise BackendUnavailable(
                f"GPU {self._device} could not {task}: {error}. A GPU that has failed does so in "
                "all that follows: load the engine in a new process"
            ) from error

    def _run(self, given: dict[str, Array]) -> list[Array]:
        held = []
        for name, array in given.items():
            self._execution.set_input_shape(name, array.shape)
            held.append(self._allocated(name, array.nbytes))
            self._cuda.memcpy_htod_async(held[-1], array, self._stream)
        found = {}
        for name in self._outputs:
            shape = tuple(self._execution.get_tensor_shape(name))
            array = np.empty(shape, self._dtypes[name])
            found[name] = array, self._allocated(name, array.nbytes)
        if not self._execution.execute_async_v3(self._stream.handle):
            raise BackendUnavailable("TensorRT could not run the engine; its log says why")
        for array, memory in found.values():
            self._cuda.memcpy_dtoh_async(array, memory, self._stream)
        self._stream.synchronize()
        return [array for array, _ in found.values()]

    def _allocated(self, name: str, size: int) -> Any:
        try:
            memory = self._cuda.mem_alloc(max(1, size))
        except self._cuda.MemoryError as error:
            raise OutOfMemory(f"the GPU has no room for {name}, {size} bytes") from error
        self._execution.set_tensor_address(name, int(memory))
        return memory

    def _checked(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        if len(inputs) != len(self.ranges):
            raise InputError(f"{len(inputs)} inputs, the engine takes {', '.join(self.ranges)}")
        for (name, shapes), x in zip(self.ranges.items(), inputs, strict=True):
            if type(x) not in PLAIN or x.dtype != self._dtypes[name]:
                found = x.dtype if type(x) in PLAIN else type(x).__name__
                raise InputError(f"{name} is {found}; give an array of {self._dtypes[name]}")
            if not shapes.holds(x.shape):
                raise InputError(
                    f"{name} is {list(x.shape)}; the engine takes {list(shapes.smallest)} to "
                    f"{list(shapes.largest)}"
                )
        named = zip(self.ranges, inputs, strict=True)
        return {name: np.ascontiguousarray(x) for name, x in named}


class _Options(msgspec.Struct, frozen=True):
    precision: str


class _Manifest(msgspec.Struct, frozen=True):
    """As much of manifest.json as is needed here; all of it is under its seal."""

    files: dict[str, FileEntry]
    options: _Options


def _manifest(container: Container) -> _Manifest:
    try:
        manifest = msgspec.json.decode(known_manifest(container), type=_Manifest)
    except msgspec.MsgspecError as error:
        raise defect(container.path, f"{MANIFEST} cannot be read: {error}") from error
    check_files(container, manifest.files)
    return manifest


def _files(container: Container, manifest: _Manifest, names: Sequence[str]) -> dict[str, bytes]:
    """Those files that there are; no others are read."""
    there = [name for name in names if name in manifest.files]
    return {name: checked(container, name, manifest.files[name]) for name in there}


def _driver() -> Any:
    """pycuda, initialised.

    Raises:
        BackendUnavailable: there is none, or no driver.
    """
    try:
        import pycuda.driver as cuda
    except ImportError as error:
        raise BackendUnavailable(
            f"pycuda cannot be imported ({error}); pip install pycuda, which builds it and "
            "needs nvcc and an NVIDIA driver"
        ) from error
    try:
        cuda.init()
    except cuda.Error as error:
        raise BackendUnavailable(f"there is no usable NVIDIA driver: {error}") from error
    return cuda


def _context(cuda: Any, number: int, origin: Origin) -> Any:
    """The GPU's primary context, of a GPU that the plan is for."""
    count = cuda.Device.count()
    if number >= count:
        raise BackendUnavailable(f"there is no GPU {number}: there are {count}")
    gpu = cuda.Device(number)
    architecture = "sm_{}{}".format(*gpu.compute_capability())
    if architecture != origin.architecture or origin.gpu not in ("", gpu.name()):
        built = f"{origin.gpu or 'a GPU'} ({origin.architecture})"
        raise BackendUnavailable(
            f"the engine was built for {built}, GPU {number} is {gpu.name()} ({architecture}): "
            "compile the model for that"
        )
    return gpu.retain_primary_context()
