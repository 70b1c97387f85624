"""What is recorded of the machine, and of which GPU."""

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastres.timing import machine

UUID = "8d2c7a0e-1111-2222-3333-444455556666"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What nvidia-smi is asked where there are two GPUs, of which it tells as if they were one."""
    questions: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        questions.append(command)
        told = "1980 MHz, 2619 MHz, 312.5 W, 700.00 W, 54, 570.1\n"
        return SimpleNamespace(returncode=0, stdout=told)

    def properties(gpu: Any) -> SimpleNamespace:
        return SimpleNamespace(uuid=UUID if gpu == torch.device("cuda:1") else "another")

    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    return questions


def test_the_state_is_of_the_gpu_that_is_meant(asked: list[list[str]]) -> None:
    found = machine.state(torch.device("cuda:1"))
    assert found["gpu clocks.sm"] == "1980 MHz" and found["gpu power.draw"] == "312.5 W"
    (question,) = asked
    assert question[1:3] == ["-i", f"GPU-{UUID}"]


def test_without_a_gpu_there_is_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert "load" in machine.state()
