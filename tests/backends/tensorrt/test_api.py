"""Which module is taken, and what is said where there is none."""

from __future__ import annotations

import importlib
import sys
from enum import IntEnum
from types import ModuleType
from typing import Any

import pytest
import torch

from fastres.backends.base import CompiledParts
from fastres.backends.tensorrt import backend
from fastres.backends.tensorrt.api import Api, find_api, find_builder
from fastres.backends.tensorrt.backend import TensorRtBackend
from fastres.backends.tensorrt.plan import Built
from fastres.backends.tensorrt.stored import Origin, write_plan
from fastres.errors import UnsupportedError
from fastres.options import Options


class Flag(IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


def fake(name: str, version: str) -> ModuleType:
    found: Any = ModuleType(name)
    found.__version__ = version
    found.NetworkDefinitionCreationFlag = Flag
    return found


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
    assert found.endswith("pip install tensorrt")  # and not what pulls in PyTorch
    missing = find_api("sm_86")
    assert isinstance(missing, str) and missing.endswith("pip install tensorrt-rtx")
    assert TensorRtBackend().unavailable() == found


def test_an_interrupted_import_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next import is tried afresh."""

    def stopped(name: str, package: str | None = None) -> ModuleType:
        raise ImportError("initialization failed") from KeyboardInterrupt()

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(importlib, "import_module", stopped)
        with pytest.raises(KeyboardInterrupt):
            find_api("sm_86")
    assert isinstance(find_api("sm_86"), Api)


def test_old_ones_are_refused_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake("tensorrt", "8.6.1"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    found = find_api()
    assert isinstance(found, str) and "tensorrt is 8.6.1, 10.0 or newer is needed" in found


class TestStoredPlans:
    """Both modules are installed: the one that built a plan runs it."""

    @pytest.fixture(autouse=True)
    def both(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rtx = fake("tensorrt_rtx", "1.7.1")
        rtx.ComputeCapability = IntEnum("ComputeCapability", ["SM86"])  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tensorrt", fake("tensorrt", "10.16.0"))
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
        monkeypatch.setattr(backend, "TensorRtExecutable", lambda api, *rest: str(api))

    @staticmethod
    def taken(builder: str, architecture: str = "sm_86", target: str | None = None) -> Any:
        origin = Origin(builder, architecture, "", {}, "fp16", "")
        parts = CompiledParts(write_plan(origin, Built(b"plan", (), b"")))
        assert TensorRtBackend().unavailable(target, parts) is None
        options = Options(precision="fp16", target=target)
        return TensorRtBackend().lower(None, options, (), parts)  # type: ignore[arg-type]

    @pytest.mark.parametrize("builder", ["tensorrt 10.16.0", "tensorrt_rtx 1.7.1"])
    def test_by_their_builder(self, builder: str) -> None:
        assert self.taken(builder) == builder and str(find_builder(builder)) == builder

    def test_what_cannot_run_here_is_built_by_the_usual_module(self) -> None:
        assert self.taken("tensorrt_rtx 1.7.1", "sm_89") == "tensorrt 10.16.0"
        assert self.taken("tensorrt_rtx 1.6.0") == "tensorrt 10.16.0"

    def test_to_be_looked_at(self) -> None:
        assert self.taken("tensorrt_rtx 1.7.1", target="sm_86") == "tensorrt_rtx 1.7.1"

    @pytest.mark.parametrize(
        ("builder", "text"),
        [
            ("tensorrt_rtx 1.6.0", "here is tensorrt_rtx 1.7.1: pip install tensorrt-rtx==1.6.0"),
            ("tensorrt 11.4.0", "here is tensorrt 10.16.0: pip install tensorrt==11.4.0"),
            ("antigravity 1.0", "built by 'antigravity 1.0', and plans are run by tensorrt or"),
            ("tensorrt 10; rm x", "built by 'tensorrt 10; rm x', and"),
            ("", "built by '', and"),
        ],
    )
    def test_what_is_not_installed_is_named(self, builder: str, text: str) -> None:
        assert text in str(find_builder(builder)) and "antigravity" not in sys.modules

    def test_a_missing_module_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        found = find_builder("tensorrt_rtx 1.7.1")
        assert "tensorrt_rtx cannot be imported" in str(found)
        assert "pip install tensorrt-rtx==1.7.1" in str(found)
        assert self.taken("tensorrt_rtx 1.7.1") == "tensorrt 10.16.0"


@pytest.mark.parametrize("precision", ["fp32", "tf32", "int8"])
def test_turing_takes_fp16_only(precision: Any) -> None:
    """Refused before anything is built: by TensorRT the reason would name nodes of its own."""
    options = Options(precision=precision, target="sm_75")
    text = rf"fp16 alone on sm_75 \(Turing\), {precision} was asked for: compile with precision="
    with pytest.raises(UnsupportedError, match=text):
        TensorRtBackend().lower(None, options, ())  # type: ignore[arg-type]


class TestAvailability:
    def test_no_gpu(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        why = str(TensorRtBackend().unavailable())
        assert "there is no NVIDIA GPU" in why and "target='sm_86' builds" in why

    def test_no_gpu_for_an_engine_that_is_built(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        why = str(TensorRtBackend().unavailable(None, CompiledParts()))
        assert "there is no NVIDIA GPU" in why and "target" not in why

    def test_no_gpu_and_not_what_built_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        for name in ("tensorrt", "tensorrt_rtx"):
            monkeypatch.setitem(sys.modules, name, None)
        origin = Origin("tensorrt_rtx 1.7.1", "sm_86", "", {}, "fp16", "")
        parts = CompiledParts(write_plan(origin, Built(b"plan", (), b"")))
        assert "pip install tensorrt-rtx==1.7.1" in str(TensorRtBackend().unavailable(None, parts))

    def test_targets(self) -> None:
        backend = TensorRtBackend()
        assert backend.unavailable("sm_86") is None
        assert "backend='triton'" in str(backend.unavailable("sm_90"))
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
