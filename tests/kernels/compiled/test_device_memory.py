"""Memory and streams against a driver that is the CPU: what is asked for, zeroed, given back."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastres.kernels.compiled import device_memory
from fastres.kernels.compiled.device_memory import DeviceMemory, Stream

OK, FULL = SimpleNamespace(value=0, name="CUDA_SUCCESS"), SimpleNamespace(value=2, name="FULL")


class Driver:
    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.current: list[int] = []
        self.waited = 0

    def cuMemAlloc(self, size: int) -> tuple[Any, ...]:
        if size > 2**20:
            return FULL, None
        memory = np.full(size, 0xAB, np.uint8)
        self.held[memory.ctypes.data] = memory
        return OK, memory.ctypes.data

    def cuMemsetD8(self, address: int, value: int, size: int) -> tuple[Any, ...]:
        ctypes.memset(address, value, size)
        return (OK,)

    def cuMemFree(self, address: int) -> tuple[Any, ...]:
        del self.held[address]
        return (OK,)

    def cuStreamCreate(self, flags: int) -> tuple[Any, ...]:
        return OK, 0x5EED

    def cuMemcpyHtoDAsync(self, to: int, of: int, size: int, stream: int) -> tuple[Any, ...]:
        assert stream == 0x5EED
        ctypes.memmove(to, of, size)
        return (OK,)

    cuMemcpyDtoHAsync = cuMemcpyHtoDAsync

    def cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        self.waited += 1
        return (OK,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver = Driver()
    monkeypatch.setattr(device_memory, "cuda_driver", lambda: driver)
    monkeypatch.setattr(device_memory, "use_device", driver.current.append)
    yield driver
    assert not driver.held and set(driver.current) <= {3}


def test_memory_is_zeroed_and_given_back(driver: Driver) -> None:
    memory = DeviceMemory(100, 3)
    assert not driver.held[memory.address].any() and len(driver.held) == 1
    del memory
    assert not driver.held


def test_nothing_is_a_byte(driver: Driver) -> None:
    assert DeviceMemory(0, 3).address


def test_no_room(driver: Driver) -> None:
    with pytest.raises(RuntimeError, match="2097152 bytes failed: FULL"):
        DeviceMemory(2**21, 3)


def test_there_and_back(driver: Driver) -> None:
    memory, stream = DeviceMemory(64, 3), Stream(3)
    given, found = np.arange(8, dtype=np.float32), np.zeros(4, np.float32)
    stream.write(memory.address, given)
    stream.read(found, memory.address + 16)
    stream.wait()
    assert found.tolist() == [4, 5, 6, 7] and driver.waited == 1 and stream.address == 0x5EED
