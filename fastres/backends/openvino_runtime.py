"""OpenVINO without the message about its use that it would send, and with errors of one line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

from fastres.errors import UnsupportedError
from fastres.options import Hint, Precision

# ours → OpenVINO's, of what is not quantised
PRECISIONS: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
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


def cpu_config(precision: Precision, hint: Hint, threads: int) -> dict[str, Any]:
    """How a model is to be compiled for the CPU."""
    return {
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        "PERFORMANCE_HINT": hint.upper(),
        "INFERENCE_NUM_THREADS": threads,
    }


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Inside, what OpenVINO raises becomes a refusal: its reason, without places in its sources.

    Raises:
        UnsupportedError: OpenVINO could not do `what`.
    """
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reasons = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
        raise UnsupportedError(
            f"OpenVINO cannot {what}: {(reasons or lines or ['it does not say why'])[0]}. Choose "
            "another backend, such as 'reference'"
        ) from error
