"""Running a linked plan's machine code through the CUDA driver; imports no triton.

Memory, contexts and recording are those of every runner (`contexts.py`); inputs are brought in by
PyTorch's own copies. No GPU has run this yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import torch

from fastres.backends.triton.planning.eight_bits import inverse
from fastres.backends.triton.planning.plan import AnyStep, LoadInput, Plan
from fastres.backends.triton.running.answering import answering
from fastres.backends.triton.running.contexts import Bound, Call, Record, Runner, title, total
from fastres.backends.triton.running.link import check_linked, takes_pictures
from fastres.backends.triton.running.linked import LinkedLaunch, LinkedPlan, values
from fastres.backends.triton.running.pack import Packed
from fastres.errors import ArtifactError
from fastres.kernels.compiled.binary import KernelBinary, KernelHeader, pack
from fastres.kernels.compiled.driver import (
    DriverModule,
    DriverUnavailable,
    encode_tensor_map,
    launch,
    use_device,
)
from fastres.kernels.compiled.tensor_map import TensorMap
from fastres.kernels.folding import MARGIN
from fastres.kernels.reference import round_tf32, saturated


class Driver(Protocol):
    """What a runner asks of the driver; tests put a fake in its place."""

    @property
    def headers(self) -> Sequence[KernelHeader]:
        """Of the kernels, by number."""

    def encode(self, tensor: TensorMap) -> bytes:
        """A tensor map's 128 bytes."""

    def launch(self, kernel: int, arguments: Sequence[bytes], programs: int) -> None:
        """Launches a kernel by its number on the current stream."""


class CudaDriver:
    """Kernels loaded on one GPU, each when it is first launched.

    Raises:
        DriverUnavailable: the package cuda-bindings, the driver or the GPU is missing.
    """

    def __init__(self, kernels: Sequence[KernelBinary], device: torch.device) -> None:
        self.headers = tuple(kernel.header for kernel in kernels)
        self._modules = [DriverModule(kernel) for kernel in kernels]
        self._device = device
        if device.type != "cuda":
            raise DriverUnavailable(f"machine code runs on NVIDIA GPUs, not on {device}")
        with torch.cuda.device(device):
            use_device(device.index)

    def encode(self, tensor: TensorMap) -> bytes:
        return encode_tensor_map(tensor)

    def launch(self, kernel: int, arguments: Sequence[bytes], programs: int) -> None:
        with torch.cuda.device(self._device):  # brings back what was current
            function = self._modules[kernel].function(self._device.index)
            stream = torch.cuda.current_stream(self._device).cuda_stream
            launch(self.headers[kernel], function, arguments, programs, stream)


class DriverRunner(Runner):
    """A plan whose kernels are machine code already.

    Args:
        plan: for the shapes of the inputs that will come.
        linked: its launches.
        driver: with the kernels that they count.
        constants: packed weights by name, on the device.
        device: where everything lies.
        record: as for every runner.

    Raises:
        ArtifactError: the linked plan does not lie within the plan's memory.
    """

    failures = (RuntimeError, ValueError)

    def __init__(
        self,
        plan: Plan,
        linked: LinkedPlan,
        driver: Driver,
        constants: Packed,
        device: torch.device,
        record: Record | None = None,
    ) -> None:
        super().__init__(plan, constants, device, record)
        self._linked = linked
        self._driver = driver
        try:
            self._weights = {key: constants.get(key) for key in linked.keys()}
            self._addresses = {key: weight.data_ptr() for key, weight in self._weights.items()}
            check_linked(linked, plan, driver.headers, self._weights)
        except ValueError as error:
            raise ArtifactError(f"the linked plan does not fit the plan: {error}") from error

    def bind(self, arena: torch.Tensor, tensors: dict[str, torch.Tensor]) -> Iterator[Bound]:
        for number, step in enumerate(self.plan.steps):
            launches = [x for x in self._linked.launches if x.step == number]
            bound = [] if isinstance(step, LoadInput) else launches  # `load` is given the pictures
            calls = tuple(self._call(x, arena) for x in bound)
            yield Bound(step, calls, total(x.cost for x in launches))

    def failing(self) -> tuple[AnyStep, Exception] | None:
        """As every runner, after trying the kernels that bring pictures in."""
        for step, (_, *sizes) in zip(self._loads, self.plan.input_shapes, strict=True):
            if takes_pictures(step):
                given = torch.zeros((1, *sizes), dtype=torch.uint8, device=self._device)
                with self.context() as context:
                    try:
                        with answering(self._device, title(step)):
                            self.load(step, given, context.tensors[step.target])
                    except self.failures as error:
                        return step, error
        return super().failing()

    def load(self, step: LoadInput, given: torch.Tensor, target: torch.Tensor) -> None:
        """By PyTorch, which rounds as the kernels do: from fp32 once, to 8 bits half to even;
        pictures by their kernel."""
        if takes_pictures(step):
            self._load_pictures(step, given, target)
            return
        if given.dtype == torch.float64:
            given = given.float()
        if step.scale is not None:
            given = saturated(given.float() * inverse(step.scale), target.dtype)
        if self.plan.places[step.target].tf32:
            given = round_tf32(given.float())
        if not step.folded:
            target[: given.shape[0]].copy_(given.permute(0, 2, 3, 1) if given.dim() == 4 else given)
            return
        n, c, h, w = given.shape
        target.zero_()  # the margin: other values lay here since
        rows, columns = (slice(MARGIN[0], MARGIN[0] + size // 2) for size in (h, w))
        # channel 4c + 2a + b of a folded pixel is the picture's c at row a and column b of the 2x2
        pixels = given.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
        inner = target[:n, rows, columns, : 4 * c]
        inner.view(*inner.shape[:3], c, 2, 2).copy_(pixels)

    def _load_pictures(self, step: LoadInput, given: torch.Tensor, target: torch.Tensor) -> None:
        if step.normalize is not None and step.normalize.flip:
            given = given.flip(1)
        pixels = given.permute(0, 2, 3, 1).contiguous()
        if pixels.data_ptr() % 16:  # as the kernel was compiled to find them
            pixels = pixels.clone()
        number = self.plan.steps.index(step)
        load = next(x for x in self._linked.launches if x.step == number)
        arena = target.data_ptr() - self.plan.places[step.target].offset
        packed = self._packed(load, arena, pixels.data_ptr())
        # the grid is pictures times tiles of one, and the plan may be for more pictures
        tiles = load.programs // self.plan.places[step.target].shape[0]
        self._driver.launch(load.kernel, packed, tiles * len(pixels))

    def _call(self, x: LinkedLaunch, arena: torch.Tensor) -> Call:
        """One launch with its parameters packed."""
        packed = self._packed(x, arena.data_ptr())
        return partial(self._driver.launch, x.kernel, packed, x.programs)

    def _packed(self, x: LinkedLaunch, arena: int, pictures: int = 0) -> list[bytes]:
        """
        Raises:
            ArtifactError: the kernel does not take what its launch is given.
        """
        header, given = self._driver.headers[x.kernel], values(x, arena, self._addresses, pictures)
        try:
            return pack(header, given, encode=self._driver.encode)
        except ValueError as error:
            raise ArtifactError(f"a launch is not what its kernel takes: {error}") from error
