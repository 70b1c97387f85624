"""Memory and a stream on a GPU through the CUDA driver; needs no compiler, torch or triton.

Needs the package cuda-bindings and an NVIDIA driver; importing this module needs neither.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastres.kernels.compiled.driver import checked, cuda_driver, use_device

Array = np.ndarray[Any, np.dtype[Any]]


class DeviceMemory:
    """Bytes on one GPU, zeroed; given back when this goes."""

    def __init__(self, size: int, device: int) -> None:
        self._device = device
        self._driver = cuda_driver()
        use_device(device)
        self.address = int(checked(self._driver.cuMemAlloc(max(1, size)), f"{size} bytes"))
        checked(self._driver.cuMemsetD8(self.address, 0, max(1, size)))

    def __del__(self) -> None:
        if hasattr(self, "address"):
            use_device(self._device)
            self._driver.cuMemFree(self.address)


class Stream:
    """An order of copies and launches on one GPU."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._driver = cuda_driver()
        use_device(device)
        self._stream = checked(self._driver.cuStreamCreate(0))

    @property
    def address(self) -> int:
        return int(self._stream)

    def write(self, address: int, array: Array) -> None:
        """Copies an array, which must lie in one piece and stay until `wait`, to the GPU."""
        use_device(self._device)
        source = array.ctypes.data
        checked(self._driver.cuMemcpyHtoDAsync(address, source, array.nbytes, self._stream))

    def read(self, array: Array, address: int) -> None:
        """Copies into an array, which is complete after `wait`."""
        use_device(self._device)
        goal = array.ctypes.data
        checked(self._driver.cuMemcpyDtoHAsync(goal, address, array.nbytes, self._stream))

    def wait(self) -> None:
        use_device(self._device)
        checked(self._driver.cuStreamSynchronize(self._stream))
