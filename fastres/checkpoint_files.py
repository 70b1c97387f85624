"""Files of weights as training leaves them, read as data: nothing in them is imported or run."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fastres.errors import BuildError
from fastres.options import PathLike

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")  # the usual ones, not a limit
_ADVICE = "save the weights alone, with torch.save(model.state_dict(), path)"
# What torch.load makes itself, or refuses itself, with weights_only=True.
_OF_TORCH = re.compile(
    r"torch\.(\w+|(cuda|sparse|cuda\.sparse)\.\w+(Storage|Tensor)"
    r"|(_utils|_tensor|storage|serialization|nn\.parameter)\.\w+)"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)"
)
_OLD_NAMES = {"long": "int", "unicode": "str", "xrange": "range"}  # which torch.save writes
_TORCH_SAVE = 0x1950A86A20F9469CFC6C  # with this number its files began before PyTorch 1.6
_LAST_PROTOCOL = 3  # of pickle, that torch.load reads with weights_only=True
_BEGINNINGS = (
    (b"\x89HDF", "an HDF5 file, as Keras writes them: convert it to PyTorch's names first"),
    (b"\x93NUMPY", f"an array of NumPy: {_ADVICE}"),
    (b"version https://git-lfs", "a pointer of Git LFS: fetch the file itself with git lfs pull"),
    (b"<", "a web page or XML: download the file itself"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"BZh", "compressed by bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
)
_loading = threading.Lock()  # PyTorch's list of what may be made is one for all threads


class _Kept:
    """Stands for an object beside the weights; whatever its pickle tells it has no effect."""

    def __new__(cls, *_: object) -> _Kept:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _KeptTable:
    """Stands for a kind of dict: an OrderedDict, which takes entries and attributes."""

    def __new__(cls, *_: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class _KeptList:
    """Stands for a kind of list."""

    def __new__(cls, *_: object) -> list[Any]:  # type: ignore[misc]
        return []


# What does no harm beside weights (settings, paths, times, numbers), and what is made in its place.
_STAND_INS: tuple[tuple[str, Callable[..., Any]], ...] = (
    (r"argparse\.Namespace|types\.SimpleNamespace|pathlib(\._local)?\.\w+", _Kept),
    (r"(datetime|decimal|fractions|uuid|zoneinfo)\.\w+|collections\.(UserDict|UserList)", _Kept),
    (r"builtins\.(bool|bytes|dict|float|frozenset|int|list|object|range|slice|str|tuple)", _Kept),
    (r"numpy\.(ndarray|dtype|bool_?|str_|bytes_|((u?int|float|complex)\d+)|dtypes\.\w+)", _Kept),
    (r"numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|random\.\w+\.\w+)", _Kept),
    (r"torch\.torch_version\.TorchVersion|typing\.Any|omegaconf(\.\w+)?\.\w+", _Kept),
    (r"collections\.defaultdict|yacs\.config\.CfgNode|easydict\.EasyDict", _KeptTable),
    (r"(pytorch_)?lightning(_fabric)?\.(\w+\.)+AttributeDict", _KeptTable),
    (r"collections\.deque", _KeptList),
)


def read_checkpoint(path: PathLike) -> Any:
    """What lies in a file of torch.save or safetensors: tensors, plain data, and tables of them.

    What the file is, is seen by its first bytes, whatever its name. Other objects are never made:
    harmless ones (settings, paths, times, NumPy's) are stood in for, unless the user allowed them
    with torch.serialization.add_safe_globals.

    Raises:
        BuildError: no such file, another kind of file, damaged, or with objects that are not known
            to be harmless; names them.

    Source: https://docs.pytorch.org/docs/stable/notes/serialization.html#torch-load-with-weights-only-true
    """
    file = Path(path)
    if not os.path.isfile(file):  # Path.is_file raises for some names that no file can have
        raise BuildError(f"there is no file {file}")
    try:
        return _read(file)
    except _Unreadable as refusal:
        raise BuildError(f"{file} cannot be read as weights: it {refusal}") from None
    except pickle.UnpicklingError as error:  # whose advice is to trust the file
        raise BuildError(
            f"{file} cannot be read as weights: it is damaged, or its pickle asks for more than "
            f"weights need, which is never run. Make it anew: {_ADVICE}"
        ) from error
    except Exception as error:  # a damaged file makes torch and safetensors raise many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BuildError(f"{file} cannot be read as weights: it is damaged ({reason})") from error


class _Unreadable(Exception):
    """Why a file that may well be sound is none of weights."""


def _read(file: Path) -> Any:
    with open(file, "rb") as opened:
        head = opened.read(512)
    if head[8:9] == b"{":  # behind the length of a header in JSON
        return safetensors.torch.load_file(file)
    if head.startswith(b"PK"):
        objects = _objects_in_zip(file)
    elif head.startswith(b"\x80"):
        objects = _objects_in_pickles(file)
    else:
        raise _Unreadable(f"is {_other_kind(head, file)}")
    with _loading:
        return _loaded(file, objects)


def _loaded(file: Path, objects: set[str]) -> Any:
    """What torch.load makes of a file that mentions these objects."""
    given = torch.serialization.get_safe_globals()
    allowed = {g[1] if isinstance(g, tuple) else f"{g.__module__}.{g.__qualname__}" for g in given}
    stand_ins = {name: _stand_in(name) for name in objects - allowed}
    foreign = sorted(n for n, kind in stand_ins.items() if not (kind or _OF_TORCH.fullmatch(n)))
    if foreign:
        some = ", ".join(foreign[:4]) + (f" and {len(foreign) - 4} more" if foreign[4:] else "")
        raise _Unreadable(
            f"holds more than tensors and plain data: {some}. Nothing of that is ever run. A file "
            "made by torch.save(model) must be made anew with torch.save(model.state_dict()); a "
            "class that you trust can be allowed by torch.serialization.add_safe_globals"
        )
    taken: list[Any] = [(kind, name) for name, kind in stand_ins.items() if kind]
    with torch.serialization.safe_globals(taken):
        return torch.load(file, map_location="cpu", weights_only=True)


def _stand_in(name: str) -> Callable[..., Any] | None:
    return next((kind for names, kind in _STAND_INS if re.fullmatch(names, name)), None)


def _objects_in_zip(file: Path) -> set[str]:
    """The names of all classes and functions that the pickle of torch.save mentions."""
    with zipfile.ZipFile(file) as archive:
        paths = {path.partition("/")[2]: path for path in archive.namelist()}
        if "constants.pkl" in paths:
            raise _Unreadable(
                f"is a TorchScript archive (torch.jit.save). Of the model that it was made of, "
                f"{_ADVICE}"
            )
        if "archive_format" in paths or "serialized_exported_program.json" in paths:
            raise _Unreadable(
                "is a program of torch.export: give torch.export.load(path) to fastres.compile, or "
                f"of the model, {_ADVICE}"
            )
        if {"manifest.json", "graph.json"} <= set(archive.namelist()):
            raise _Unreadable("is a saved engine: fastres.load(path) opens it")
        if "data.pkl" not in paths:
            raise _Unreadable(f"is a zip file, but none of torch.save: {_ADVICE}")
        return _objects(pickletools.genops(archive.read(paths["data.pkl"])))


def _objects_in_pickles(file: Path) -> set[str]:
    """Likewise of files before PyTorch 1.6: a number, a version, a system, objects, storages."""
    with open(file, "rb") as opened:
        first = pickletools.genops(opened)
        if not any(argument == _TORCH_SAVE for _, argument, _ in first):
            raise _Unreadable(f"is a bare pickle, which torch.save did not write: {_ADVICE}")
        list(first)  # up to its end
        return set().union(*(_objects(pickletools.genops(opened)) for _ in range(3)))


def _objects(operations: Iterable[tuple[pickletools.OpcodeInfo, Any, int | None]]) -> set[str]:
    found = set()
    for operation, argument, _ in operations:
        if operation.name == "PROTO" and argument > _LAST_PROTOCOL:
            raise _Unreadable(
                f"was written with pickle's protocol {argument}, which cannot be read without "
                "running it: save it without pickle_protocol"
            )
        if operation.name == "GLOBAL":
            module, _, name = argument.partition(" ")
            old = module == "__builtin__"
            found.add(f"builtins.{_OLD_NAMES.get(name, name)}" if old else f"{module}.{name}")
    return found


def _other_kind(head: bytes, file: Path) -> str:
    if not head:
        return "empty"
    if head[257:262] == b"ustar":
        return f"a tar archive: unpack it and give what lies in it, or {_ADVICE}"
    # a protobuf whose first field is a small version, followed by a name, a graph or opsets
    if file.suffix == ".onnx" or re.match(rb"\x08[\x01-\x1f][\x12\x1a\x3a\x42]", head):
        return f"an ONNX file. Of the model that it was made of, {_ADVICE}"
    for beginning, kind in _BEGINNINGS:
        if head.lstrip().startswith(beginning):
            return kind
    return f"no file of torch.save or safetensors: {_ADVICE}"
