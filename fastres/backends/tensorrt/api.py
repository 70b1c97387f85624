"""One face for the modules that TensorRT comes as, with what they differ in named here.

- tensorrt 10: strong typing has to be asked for.
- tensorrt 11: there is no other typing; the flag is still taken.
- tensorrt_rtx 1: as 11, and builds for architectures that need not be here. It leaves the choice of
  kernels to the GPU that runs the engine, so there are no timings and no timing cache to keep.

All of them take int8 from QuantizeLinear and DequantizeLinear alone. tensorrt 8 takes types as mere
wishes, so it is refused.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

OLDEST = (10, 0)
_NAMES = ("tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class Api:
    """A module that is installed and not too old."""

    module: Any
    name: str
    version: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {'.'.join(map(str, self.version))}"

    @property
    def is_rtx(self) -> bool:
        return self.name == "tensorrt_rtx"

    @property
    def network_flags(self) -> int:
        """For `Builder.create_network`: tensors have the types that the ONNX file gives them."""
        return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def architecture(self, target: str) -> Any:
        """The module's word for "sm_86"; None if it does not build for that."""
        known = getattr(self.module, "ComputeCapability", None)
        return getattr(known, target.replace("sm_", "SM"), None)

    @property
    def architectures(self) -> tuple[str, ...]:
        """Those that it builds for without having one, such as "sm_86", the oldest first."""
        known = getattr(self.module, "ComputeCapability", None)
        names = (re.fullmatch(r"SM(\d+)", name) for name in dir(known))
        return tuple(f"sm_{n}" for n in sorted(int(match[1]) for match in names if match))


def find_api(target: str | None = None) -> Api | str:
    """The module to use, or why there is none and what to type.

    Args:
        target: an architecture to build for that is not here: a task for tensorrt_rtx alone.
    """
    reasons = []
    for name in _NAMES if target is None else _NAMES[1:]:
        found = _load(name)
        if isinstance(found, Api):
            return found
        reasons.append(found)
    what = "fastres[tensorrt]" if target is None else "tensorrt-rtx"
    return f"{'; '.join(reasons)}; pip install '{what}'"


@cache
def _load(name: str) -> Api | str:
    try:
        module: ModuleType = importlib.import_module(name)
        text = str(module.__version__)
    except Exception as error:  # without its libraries the module raises what it likes
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{name} cannot be imported ({first})"
    version = tuple(int(part) for part in re.findall(r"\d+", text))
    if name == "tensorrt" and version < OLDEST:
        return f"tensorrt is {text}, {'.'.join(map(str, OLDEST))} or newer is needed"
    return Api(module, name, version)
