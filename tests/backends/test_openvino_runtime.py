"""OpenVINO is imported without its telemetry."""

from __future__ import annotations

import subprocess
import sys

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
