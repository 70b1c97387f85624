"""The compiled library: found, loaded, and what it can do on this processor."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

NAME = "libfastres_cpu.so"
INSTRUCTIONS = ("none", "AVX2", "AVX-512")  # as the library numbers them
_SIZE, _POINTER = ctypes.c_int64, ctypes.c_void_p


class Given(ctypes.Structure):
    """`fastres_convolution` of convolution.h."""

    _fields_ = (
        *((name, _SIZE) for name in ("images", "height", "width", "channels", "outputs")),
        *(("x", _POINTER), ("x_pixel", _SIZE), ("x_group", _SIZE)),
        *(("residual", _POINTER), ("residual_pixel", _SIZE), ("residual_group", _SIZE)),
        *(("y", _POINTER), ("y_pixel", _SIZE), ("y_group", _SIZE)),
        *((name, _POINTER) for name in ("weight", "bias", "prepared")),
        *((name, ctypes.c_int32) for name in ("relu", "tile", "shared", "threads")),
        *((name, _SIZE) for name in ("block", "chunk")),
    )


@cache
def why_not() -> str | None:
    """Why the library cannot be used here; None if it can."""
    path = Path(__file__).with_name(NAME)
    if not path.is_file():
        return "it was not built: fastres was installed without a compiler or oneTBB's headers"
    try:
        found = _library()
    except (OSError, ImportError) as error:
        return f"{path} cannot be loaded: {error}"
    if not found.fastres_instructions():
        return "this processor has neither AVX2 with FMA nor AVX-512"
    return None


def instructions() -> int:
    """The best set that both this processor and the library have: an index of INSTRUCTIONS."""
    return 0 if why_not() is not None else int(_library().fastres_instructions())


def prepared_size(isa: int, tile: int, channels: int, outputs: int) -> int:
    """How many floats the transformed weights of a convolution take."""
    return int(_library().fastres_prepared_size(isa, tile, channels, outputs))


def prepare(isa: int, tile: int, channels: int, outputs: int, weight: int, prepared: int) -> None:
    """Transforms weights [outputs][channels][3][3], both given by their addresses."""
    _library().fastres_prepare(isa, tile, channels, outputs, weight, prepared)


def convolve(isa: int, given: Given) -> None:
    """
    Raises:
        MemoryError: there is not enough for what lies between.
    """
    if not _library().fastres_convolve(isa, ctypes.byref(given)):
        raise MemoryError("no memory for the tiles of a convolution")


@cache
def _library() -> ctypes.CDLL:
    """Loaded after OpenVINO's oneTBB, whose threads it shares, under the name that it asks for."""
    spec = importlib.util.find_spec("openvino")
    if spec is None or spec.origin is None:
        raise ImportError("openvino, whose threads it runs on, is not installed")
    ctypes.CDLL(str(Path(spec.origin).parent / "libs" / "libtbb.so.12"))
    found = ctypes.CDLL(str(Path(__file__).with_name(NAME)))
    found.fastres_instructions.argtypes = ()
    found.fastres_prepared_size.argtypes = (ctypes.c_int, ctypes.c_int, _SIZE, _SIZE)
    found.fastres_prepared_size.restype = _SIZE
    found.fastres_prepare.argtypes = (*found.fastres_prepared_size.argtypes, _POINTER, _POINTER)
    found.fastres_prepare.restype = None
    found.fastres_convolve.argtypes = (ctypes.c_int, ctypes.POINTER(Given))
    return found
