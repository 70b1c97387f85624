"""fastres: a custom-kernel, high-performance ResNet inference engine.

    engine = fastres.compile(model)
    y = engine(x)

Names are imported when they are first used: `import fastres` costs little beyond torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

_HERE = os.path.dirname(__file__)
# a checkout, where setup.py finds some packages beside this; pathlib takes a while to import
if not os.path.exists(os.path.join(_HERE, "kernels")):
    __path__.append(os.path.dirname(_HERE))

from fastres.version import __version__ as __version__  # noqa: E402

if TYPE_CHECKING:
    from fastres import deploy as deploy
    from fastres import errors as errors
    from fastres import models as models
    from fastres.building import build as build
    from fastres.calib.images import Preprocess as Preprocess
    from fastres.calib.table import CalibrationTable as CalibrationTable
    from fastres.compiler import compile as compile
    from fastres.engine.engine import Engine as Engine
    from fastres.engine.load import load as load
    from fastres.engine.predict import Prediction as Prediction
    from fastres.exporting import export as export
    from fastres.graph.builder import ResNetSpec as ResNetSpec
    from fastres.options import Input as Input
    from fastres.parity.verify import verify as verify
    from fastres.quantization.quantize import quantize as quantize
    from fastres.summaries import summary as summary
    from fastres.timing.benchmark import benchmark as benchmark

_HOMES = {
    "compile": "fastres.compiler",
    "build": "fastres.building",
    "load": "fastres.engine.load",
    "verify": "fastres.parity.verify",
    "quantize": "fastres.quantization.quantize",
    "export": "fastres.exporting",
    "benchmark": "fastres.timing.benchmark",
    "summary": "fastres.summaries",
    "Engine": "fastres.engine.engine",
    "Prediction": "fastres.engine.predict",
    "Input": "fastres.options",
    "Preprocess": "fastres.calib.images",
    "CalibrationTable": "fastres.calib.table",
    "ResNetSpec": "fastres.graph.builder",
}
_MODULES = ("deploy", "errors", "models")
__all__ = ["__version__", *_MODULES, *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastres.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fastres' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # found once: later look-ups do not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
