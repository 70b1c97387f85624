"""OpenVINO is imported without its telemetry."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastres.backends.openvino_runtime import refusing
from fastres.errors import UnsupportedError

CODE = """
import socket, os
def forbidden(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = forbidden
forks = []
os.register_at_fork(before=lambda: forks.append(1))
from fastres.backends.openvino_runtime import core, openvino
print("CPU" in core().available_devices, len(forks), openvino() is openvino())
import sys
print("openvino_telemetry" in sys.modules)
import openvino_telemetry  # still there for whoever wants it
"""


def test_no_message_is_sent() -> None:
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert result.stdout.split() == ["True", "0", "True", "False"], result.stderr


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (
            "Exception from src/a.cpp:117:\nCheck 'ptr' failed at src/b.cpp:345:\nNo form: 0\n\n",
            "No form: 0",
        ),
        ("Exception from src/a.cpp:117:\n\n", "Exception from src/a.cpp:117:"),
        ("", "it does not say why"),
    ],
)
def test_an_error_becomes_its_reason(raised: str, reason: str) -> None:
    with pytest.raises(UnsupportedError) as caught, refusing("compile this"):
        raise RuntimeError(raised)
    assert str(caught.value) == (
        f"OpenVINO cannot compile this: {reason}. Choose another backend, such as 'reference'"
    )
