"""fastres doctor: what it finds, and what it says when something is missing."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from typer.testing import Result

from fastres import installed
from fastres.backends import cpu, openvino_runtime, select

Run = Callable[..., Result]
RunJson = Callable[..., dict[str, Any]]


def test_a_healthy_machine_is_0(run: Run, run_json: RunJson) -> None:
    document = run_json("doctor")
    packages = {package["name"]: package for package in document["packages"]}
    assert packages["torch"]["version"] == torch.__version__.partition("+")[0]
    assert packages["pillow"]["problem"] is None and "pytest" not in packages
    states = {backend["name"]: backend["problem"] for backend in document["backends"]}
    assert states.keys() == select.BACKENDS.keys() and states["cpu"] is None
    text = run("doctor").stdout
    assert "backend cpu: can run here" in text and "openvino" in text


def test_what_is_missing_comes_with_the_line_to_type(
    run: Run, run_json: RunJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino_runtime.openvino.cache_clear()  # another test may have imported it already
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    document = run_json("doctor", status=3)
    assert document["install"][0].startswith("pip install 'openvino>=")
    assert any(line.startswith("pip install 'onnxruntime>=") for line in document["install"][1:])
    states = {backend["name"]: backend["problem"] for backend in document["backends"]}
    assert "pip install openvino" in states["cpu"]
    assert "to install: pip install 'openvino>=" in run("doctor", status=3).stdout


def test_an_optional_package_is_no_failure(
    run_json: RunJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert any("timm" in line for line in run_json("doctor")["install"])


def test_no_backend_at_all_is_3(run_json: RunJson, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.CpuBackend, "unavailable", lambda self: "on strike")
    for name in select.BACKENDS:
        monkeypatch.setitem(select.BACKENDS, name, cpu.CpuBackend)
    document = run_json("doctor", status=3)
    assert all(backend["problem"] == "on strike" for backend in document["backends"])


def test_without_torch_it_still_answers(run_json: RunJson, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = installed.Package(
        "torch", "2.15.0", "torch>=2.11", "required", "cannot be imported: x"
    )
    monkeypatch.setattr(installed, "_package", lambda *_: broken)
    document = run_json("doctor", status=3)
    assert document["gpu"] == {} and document["backends"][0]["problem"] == "torch does not work"


def test_gpus_are_listed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory = "NVIDIA X", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(installed, "_backends", lambda: [installed.BackendState("triton", None)])
    assert "GPU: NVIDIA X (sm_90, 80.0 GiB)" in run("doctor").stdout
