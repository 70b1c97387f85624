"""Importing OpenVINO without the message about its use that it would send."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType
from typing import Any

_TELEMETRY = "openvino_telemetry"


@cache
def openvino() -> ModuleType:
    """The module `openvino`, imported once.

    On import it sends an event to its makers, from a process of its own. An inference library has
    no business on the network, so its telemetry package is hidden for the moment of the import;
    OpenVINO then takes its own stub in its place.

    Raises:
        ImportError: it is not installed.
    """
    modules: dict[str, Any] = sys.modules
    hidden = modules.pop(_TELEMETRY, None)
    modules[_TELEMETRY] = None  # makes an import of it fail
    try:
        return importlib.import_module("openvino")
    finally:
        del modules[_TELEMETRY]
        if hidden is not None:
            modules[_TELEMETRY] = hidden


@cache
def core() -> Any:
    """The one OpenVINO core of this process."""
    return openvino().Core()
