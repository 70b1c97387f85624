"""The settings that travel through the corridor: `Input` and the frozen `Options`."""

from __future__ import annotations

import math
import operator
import os
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from fastres.errors import InputError

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
Hint = Literal["latency", "throughput"]
Oversize = Literal["split", "error"]
OnUnsupported = Literal["error", "fallback"]

EIGHT_BITS: tuple[Precision, ...] = ("int8", "fp8")  # which need a calibration
PRECISION_OF: dict[torch.dtype, Precision] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp32",
}
DTYPE_OF: dict[Precision, torch.dtype] = {  # of what is not quantised
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,
    "fp8": torch.float32,
}
Sizes = tuple[int, ...]
ANY_BATCH = 1 << 16  # an engine takes any batch; what must hold for all is tried up to this one
LARGEST = 2**30  # values of a usual input (4 GiB in fp32), and the largest size or count
_THREADS = 4096
_TARGET = re.compile(r"sm_[1-9][0-9]{1,2}")


@dataclass(frozen=True)
class Input:
    """What an engine is fed: one shape, or a range (smallest, usual, largest) of shapes.

    The batch size N is always free. H and W are fixed where smallest and largest agree, and may
    vary between them otherwise. Example: `Input(((1, 3, 160, 160), (8, 3, 224, 224),
    (32, 3, 320, 320)))`.

    Args:
        shape: (N, C, H, W), or three of them; the usual one holds at most 2**30 values.
        dtype: of the input; None takes the model's.
        format: "NCHW" is the only one so far.
        name: None takes the name of the model's argument.

    Raises:
        InputError: a size below 1 or out of reach, ranks or orders that do not fit, or a range
            over channels.
    """

    shape: Sizes | tuple[Sizes, Sizes, Sizes]
    dtype: torch.dtype | None = None
    format: Literal["NCHW"] = "NCHW"
    name: str | None = None

    smallest: Sizes = field(init=False)
    usual: Sizes = field(init=False)
    largest: Sizes = field(init=False)

    def __post_init__(self) -> None:
        if self.format != "NCHW":
            raise InputError(f"format {self.format!r} is not supported; use 'NCHW'")
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise InputError(f"dtype is {self.dtype!r}; give a torch.dtype, or None")
        if self.name is not None and not (isinstance(self.name, str) and self.name):
            raise InputError(f"name is {self.name!r}; give a text, or None")
        smallest, usual, largest = three = _three(self.shape)
        if not len(smallest) == len(usual) == len(largest):
            raise InputError(f"the shapes {three} must have the same rank")
        if len(usual) < 2:
            raise InputError(
                f"an input is {list(usual)}; one has a batch of something, rank 2 or more: let the "
                "model take [N, 1]"
            )
        for i, sizes in enumerate(zip(*three, strict=True)):
            if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
                raise InputError(
                    f"dimension {i} goes from {sizes[0]} over {sizes[1]} to {sizes[2]}; it must be "
                    "at least 1 and must not fall"
                )
            if sizes[0] != sizes[2] and i not in (0, 2, 3):
                raise InputError(f"dimension {i} is ranged; only N, H and W may vary")
        if max(largest) > LARGEST or math.prod(usual) > LARGEST:
            raise InputError(
                f"the shape {three[1:] if usual != largest else usual} is too large to run: an "
                f"input may hold {LARGEST} values, and no size may be above that"
            )
        # plain tuples, so that an Input can be compared and hashed whatever it was made from
        object.__setattr__(self, "shape", usual if smallest == largest else three)
        object.__setattr__(self, "smallest", smallest)
        object.__setattr__(self, "usual", usual)
        object.__setattr__(self, "largest", largest)

    @property
    def ranged(self) -> tuple[int, ...]:
        """The dimensions other than N that may vary."""
        rank = range(1, len(self.usual))
        return tuple(i for i in rank if self.smallest[i] != self.largest[i])


def _three(shape: object) -> tuple[Sizes, Sizes, Sizes]:
    """One shape, or three, as three."""
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise InputError(
            f"shape {reprlib.repr(shape)} is neither one shape nor three of them; give (N, C, H, W)"
        )
    if not any(isinstance(item, Sequence) for item in shape):
        return (_sizes(shape),) * 3
    if len(shape) != 3 or not all(isinstance(item, Sequence) for item in shape):
        raise InputError(
            f"shape {shape!r} is neither one shape nor three of them: give (N, C, H, W), or the "
            "smallest, the usual and the largest of these"
        )
    smallest, usual, largest = map(_sizes, shape)
    return smallest, usual, largest


def _sizes(shape: Sequence[Any]) -> Sizes:
    try:
        if not any(isinstance(size, bool) for size in shape):
            return tuple(operator.index(size) for size in shape)
    except TypeError:
        pass
    raise InputError(
        f"shape {shape!r} holds something that is not an integer; where H and W vary, give three "
        "shapes: the smallest, the usual and the largest"
    )


def usual_sizes(smallest: Sizes, largest: Sizes) -> Sizes:
    """What to expect between two shapes: a batch of one, and H and W of 224, or what is nearest."""
    wanted = (1, *(224,) * (len(smallest) - 1))
    return tuple(max(a, min(w, b)) for a, w, b in zip(smallest, wanted, largest, strict=True))


@dataclass(frozen=True)
class Options:
    """Settings of `fastres.compile`; see there. None stands for "the backend's default"."""

    backend: Sequence[str] = ("auto",)
    precision: Precision | None = None
    hint: Hint = "latency"
    device: torch.device | None = None
    max_batch_size: int | None = None
    oversize: Oversize = "split"
    on_unsupported: OnUnsupported = "error"
    threads: int | None = None
    cache_size: int = 8
    target: str | None = None
    cuda_graph: bool | None = None
    dependent_launch: bool | None = None
    sync_launches: bool | None = None
    tune: bool = False
    cache_dir: str | None = None
    promised_batch: int | None = None  # the largest of the inputs; set where they are lowered

    def __post_init__(self) -> None:
        if self.target is not None and not (
            isinstance(self.target, str) and _TARGET.fullmatch(self.target)
        ):
            raise InputError(
                f"target is {self.target!r}; give a GPU architecture such as 'sm_90', or None for "
                "this machine"
            )
        if self.target is not None and self.on_unsupported == "fallback":
            raise InputError(
                "a fallback to PyTorch cannot be built for another machine: leave out target= or "
                "on_unsupported='fallback'"
            )
        if not isinstance(self.tune, bool):
            raise InputError(f"tune is {self.tune!r}; give True or False")
        if self.tune and self.target is not None:
            raise InputError(f"tuning needs a {self.target} GPU: leave out target= or tune=")
        if self.cache_dir is not None:
            object.__setattr__(self, "cache_dir", _folder(self.cache_dir))
        for name in ("cuda_graph", "dependent_launch", "sync_launches"):
            if not isinstance(getattr(self, name), bool | None):
                raise InputError(f"{name} is {getattr(self, name)!r}; give True, False or None")
        _one_of("precision", self.precision, (None, *get_args(Precision)))
        _one_of("hint", self.hint, get_args(Hint))
        _one_of("oversize", self.oversize, get_args(Oversize))
        _one_of("on_unsupported", self.on_unsupported, get_args(OnUnsupported))
        for name in ("max_batch_size", "threads", "cache_size"):
            value = getattr(self, name)
            if value is None and name != "cache_size":
                continue
            count = integer(name, value, most=_THREADS if name == "threads" else LARGEST)
            object.__setattr__(self, name, count)
        names: object = self.backend
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise InputError(f"backend is {names!r}; give a name or a list of names")
        if not all(isinstance(name, str) for name in names):
            raise InputError(f"backend is {names!r}; give a name or a list of names")
        object.__setattr__(self, "backend", tuple(names))

    @property
    def sm(self) -> int | None:
        """The target as compute capability times ten; None for this machine."""
        return None if self.target is None else int(self.target.removeprefix("sm_"))

    @property
    def num_threads(self) -> int:
        """CPU threads to use: as asked, else every core this process may run on."""
        return self.threads or len(os.sched_getaffinity(0))


def cache_folder(cache_dir: str | None) -> Path:
    """`cache_dir`, else `fastres` in $XDG_CACHE_HOME or in ~/.cache."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastres"
    return usual if cache_dir is None else Path(cache_dir)


def integer(name: str, value: Any, *, least: int = 1, most: int = LARGEST) -> int:
    """A count that a caller gave, be it Python's integer or NumPy's.

    Raises:
        InputError: it is no integer, or out of its range.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        too_large = number is not None and number > most
        bound = f"at most {most}" if too_large else f"an integer of at least {least}"
        raise InputError(f"{name} is {value!r}; it must be {bound}")
    return number


def _folder(path: object) -> str:
    try:
        folder: str = os.fsdecode(os.fspath(path))  # type: ignore[call-overload]
    except TypeError:
        folder = ""
    if not folder or "\0" in folder:
        raise InputError(f"cache_dir is {path!r}; give a folder, or None")
    return folder


def is_number(value: object) -> bool:
    """Whether a value is a finite real number, Python's or NumPy's."""
    if isinstance(value, bool):
        return False
    return isinstance(value, Real) and math.isfinite(value)


def as_device(device: str | torch.device | None) -> torch.device | None:
    """The device that a caller named; None stands for the backend's own.

    Raises:
        InputError: there is no such kind of device.
    """
    if device is None or isinstance(device, torch.device):
        return device
    if not isinstance(device, str):
        raise InputError(f"device is {device!r}; give a text such as 'cpu', or a torch.device")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} is not one: {error}") from error


def _one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if not isinstance(value, str | None) or value not in allowed:
        names = ", ".join(repr(a) for a in allowed)
        raise InputError(f"{name} is {value!r}; supported are {names}")


PathLike = str | os.PathLike[str] | Path
