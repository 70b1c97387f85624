"""Which module is taken, and what is said where there is none."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from enum import IntEnum
from types import ModuleType
from typing import Any

import pytest
import torch

from fastres.backends.tensorrt import api as module
from fastres.backends.tensorrt.api import Api, find_api
from fastres.backends.tensorrt.backend import TensorRtBackend


class Flag(IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


def fake(name: str, version: str) -> ModuleType:
    found: Any = ModuleType(name)
    found.__version__ = version
    found.NetworkDefinitionCreationFlag = Flag
    return found


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    module._load.cache_clear()
    yield
    module._load.cache_clear()


@pytest.mark.parametrize("version", ["10.0.1", "10.16.0.45", "11.4.0"])
def test_tensorrt_comes_before_rtx(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake("tensorrt", version))
    found = find_api()
    assert isinstance(found, Api) and str(found) == f"tensorrt {version}" and not found.is_rtx
    assert found.network_flags == 2 and found.architecture("sm_90") is None
    other = find_api("sm_86")  # a task for the other module
    assert isinstance(other, Api) and other.is_rtx


def test_rtx_where_there_is_no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    found = find_api()
    assert isinstance(found, Api) and found.is_rtx
    assert "sm_86" in found.architectures and found.architecture("sm_86") is not None
    assert found.architecture("sm_90") is None and found.architecture("sm_1") is None


@pytest.mark.parametrize("error", [ImportError("no libnvinfer"), RuntimeError("bad"), OSError("x")])
def test_without_any_of_them_it_says_what_to_type(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, package: str | None = None) -> ModuleType:
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    found = find_api()
    assert isinstance(found, str) and str(error) in found
    assert "pip install 'fastres[tensorrt]'" in found
    missing = find_api("sm_86")
    assert isinstance(missing, str) and "pip install 'tensorrt-rtx'" in missing
    assert TensorRtBackend().unavailable() == found


def test_old_ones_are_refused_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake("tensorrt", "8.6.1"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    found = find_api()
    assert isinstance(found, str) and "tensorrt is 8.6.1, 10.0 or newer is needed" in found


class TestAvailability:
    def test_no_gpu(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        assert "there is no NVIDIA GPU" in str(TensorRtBackend().unavailable())

    def test_targets(self) -> None:
        backend = TensorRtBackend()
        assert backend.unavailable("sm_86") is None
        assert "builds for sm_75, sm_80, sm_86" in str(backend.unavailable("sm_90"))

    def test_a_gpu_that_rtx_does_not_know(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        for capability, reason in (((9, 0), "this GPU is sm_90"), ((8, 6), "None")):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
            assert reason in str(TensorRtBackend().unavailable())

    def test_precisions(self) -> None:
        backend = TensorRtBackend()
        assert [backend.precision(p) for p in ("fp32", "tf32", "fp16", "int8")] == [None] * 4
        assert "not bf16" in str(backend.precision("bf16"))
