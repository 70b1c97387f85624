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
from types import ModuleType
from typing import Any

from fastres.errors import is_interrupt

OLDEST = (10, 0)
_PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}  # by the module's name


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
    names = list(_PACKAGES) if target is None else ["tensorrt_rtx"]
    for name in names:
        found = _load(name)
        if isinstance(found, Api):
            return found
        reasons.append(found)
    return f"{'; '.join(reasons)}; pip install {_PACKAGES[names[0]]}"


def find_builder(builder: str) -> Api | str:
    """The module that built a plan, whatever else is installed; or why not, and what to type.

    Args:
        builder: module and version, as `str(Api)` has them; a file's word, so no other is imported.
    """
    package = package_of(builder)
    if package is None:
        return (
            f"the engine was built by {builder!r}, and plans are run by {' or '.join(_PACKAGES)}: "
            "compile the model here"
        )
    found = _load(builder.split()[0])
    if isinstance(found, Api) and str(found) == builder:
        return found
    here = f"here is {found}" if isinstance(found, Api) else found
    return (
        f"the engine was built by {builder}, {here}: pip install {package}, or compile the model "
        "here"
    )


def package_of(builder: str) -> str | None:
    """What pip has to install for it; None if it is neither of the two modules in some version."""
    name, _, version = builder.partition(" ")
    if name in _PACKAGES and re.fullmatch(r"\d+(\.\d+)*", version):
        return f"{_PACKAGES[name]}=={version}"
    return None


def _load(name: str) -> Api | str:
    try:
        module: ModuleType = importlib.import_module(name)
        text = str(module.__version__)
    except Exception as error:  # without its libraries the module raises what it likes
        if is_interrupt(error):
            raise KeyboardInterrupt from error
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return f"{name} cannot be imported ({first})"
    version = tuple(int(part) for part in re.findall(r"\d+", text))
    if name == "tensorrt" and version < OLDEST:
        return f"tensorrt is {text}, {'.'.join(map(str, OLDEST))} or newer is needed"
    return Api(module, name, version)
