"""Files of weights as training leaves them, read as data: nothing in them is imported or run."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import safetensors.torch
import torch

from fastres.calib.files import open_regular
from fastres.checkpoints.pickles import MOST_TENSORS, Reader, Request, TooMuch
from fastres.checkpoints.zips import PICKLE, Ambiguous, check_storages, open_zip, parts, pickled
from fastres.errors import BuildError
from fastres.options import PathLike
from fastres.wording import LINE, listed, named

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")  # the usual ones, not a limit
_ADVICE = "save the weights alone, with torch.save(model.state_dict(), path)"
_TOO_MUCH = "is damaged, or its pickle asks for more than weights need, which is never run"
# What torch.load makes itself, or refuses itself, with weights_only=True.
_OF_TORCH = re.compile(
    r"torch\.(\w+|(cuda|sparse|cuda\.sparse)\.\w+(Storage|Tensor)"
    r"|(_utils|_tensor|storage|serialization|nn\.parameter)\.\w+)"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)"
)
_TORCH_SAVE = 0x1950A86A20F9469CFC6C  # with this number its files began before PyTorch 1.6
_SMALL = 1 << 25  # bytes that any file may ask for
_MOST_HEADER = 1 << 24  # bytes of a header of safetensors
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


def read_checkpoint(path: PathLike, max_bytes: int | None = None) -> Any:
    """What lies in a file of torch.save or safetensors: tensors, plain data, and tables of them.

    What the file is, is seen by its first bytes, whatever its name. Other objects are never made:
    harmless ones (settings, paths, times, NumPy's) are stood in for, unless the user allowed them
    with torch.serialization.add_safe_globals. What the file asks for is counted before any of it is
    made; see docs/security.md.

    Args:
        max_bytes: what its tensors may say they take, each counted as if it shared nothing; None
            is twice the file, or 32 MiB if that is more.

    Raises:
        BuildError: no such file, another kind of file, damaged, with objects that are not known to
            be harmless, or one that asks for more than that; names what.

    Source: https://docs.pytorch.org/docs/stable/notes/serialization.html#torch-load-with-weights-only-true
    """
    if max_bytes is not None and not (type(max_bytes) is int and max_bytes >= 1):
        raise BuildError(f"max_bytes is {max_bytes!r}; give an integer of at least 1, or None")
    name = named(path, LINE // 2)
    try:
        file = open_regular(path)
    except OSError as error:
        reason = error.strerror
        raise BuildError(f"there is no file {name} that can be read: {reason}") from error
    try:
        with file:
            return _read(file, Path(path), max_bytes)
    except _Unreadable as refusal:
        raise BuildError(f"{name} cannot be read as weights: it {refusal}") from None
    except pickle.UnpicklingError as error:  # whose advice is to trust the file
        raise BuildError(
            f"{name} cannot be read as weights: it {_TOO_MUCH}. Make it anew: {_ADVICE}"
        ) from error
    except Exception as error:  # a damaged file makes torch and safetensors raise many kinds
        reason = named(str(error).strip().partition("\n")[0]) or type(error).__name__
        raise BuildError(f"{name} cannot be read as weights: it is damaged ({reason})") from error


class _Unreadable(Exception):
    """Why a file that may well be sound is none of weights."""


def _read(file: BinaryIO, path: Path, max_bytes: int | None) -> Any:
    size = os.fstat(file.fileno()).st_size
    head = file.read(512)
    if head[8:9] == b"{":  # behind the length of a header in JSON
        _check_header(file, int.from_bytes(head[:8], "little"))
        return safetensors.torch.load_file(path)
    with _loading:
        given = torch.serialization.get_safe_globals()
    allowed = {g[1] if isinstance(g, tuple) else f"{g.__module__}.{g.__qualname__}" for g in given}
    reader = Reader(lambda name: name in allowed or not _of_torch_alone(name))
    try:
        if head.startswith(b"PK") and head[30:43] == b"manifest.json":
            raise _Unreadable("is a saved engine: fastres.load(path) opens it")
        if head.startswith(b"PK"):
            _follow_zip(file, reader)
        elif head.startswith(b"\x80"):
            _follow_pickles(file, reader)
        else:
            raise _Unreadable(f"is {_other_kind(head, path)}")
    except TooMuch as error:
        raise _Unreadable(str(error)) from error
    except Ambiguous as error:
        raise _Unreadable(f"is damaged: {error}") from error
    stand_ins = _stand_ins(reader.asked.objects - allowed)
    _check(reader.asked, size, max_bytes)
    with _loading, torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True)


def _stand_ins(objects: Collection[str]) -> list[Any]:
    """What is made in place of objects that torch.load does not know, with their names."""
    found = {name: _stand_in(name) for name in objects}
    foreign = sorted(n for n, kind in found.items() if not (kind or _OF_TORCH.fullmatch(n)))
    if foreign:
        raise _Unreadable(
            f"holds more than tensors and plain data: {listed(foreign, 4)}. Nothing of that is "
            "ever run. A file made by torch.save(model) must be made anew with "
            "torch.save(model.state_dict()); a class that you trust can be allowed by "
            "torch.serialization.add_safe_globals"
        )
    return [(kind, name) for name, kind in found.items() if kind]


def _check(asked: Request, size: int, max_bytes: int | None) -> None:
    """Refuses what is out of proportion to the file."""
    if asked.refusal:
        raise _Unreadable(f"{_TOO_MUCH} ({asked.refusal}). Make it anew: {_ADVICE}")
    _check_count(max(asked.tensors, asked.named))
    stored = sum(storage.size for storage in asked.storages.values())
    wanted, most = max(asked.size, stored), max_bytes or max(_SMALL, 2 * size)
    if wanted > most:
        usual = "" if max_bytes else ": twice its size, or 32 MiB"
        raise _Unreadable(
            f"has {size} bytes and says that its tensors take {wanted}, where at most {most} are "
            f"taken{usual}. If you trust it, pass max_bytes={wanted} (--max-bytes)"
        )


def _check_count(tensors: int) -> None:
    if tensors > MOST_TENSORS:
        raise _Unreadable(
            f"holds {tensors} tensors, of which at most {MOST_TENSORS} are taken: {_ADVICE}"
        )


def _check_header(file: BinaryIO, length: int) -> None:
    """Counts what a header of safetensors lists, whose own reader sees to the sizes."""
    if length > _MOST_HEADER:
        raise _Unreadable(f"has a header of {length} bytes; at most {_MOST_HEADER} are taken")
    file.seek(8)
    _check_count(len(msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])))


def _stand_in(name: str) -> Callable[..., Any] | None:
    return next((kind for names, kind in _STAND_INS if re.fullmatch(names, name)), None)


def _of_torch_alone(name: str) -> bool:
    """Whether torch.load makes it itself: what it is called with must be looked at."""
    return _OF_TORCH.fullmatch(name) is not None and _stand_in(name) is None


def _follow_zip(file: BinaryIO, reader: Reader) -> None:
    """Counts what the pickle of torch.save asks for, and holds it to what lies beside it."""
    with open_zip(file) as archive:
        short = {name.partition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in short:
            raise _Unreadable(
                f"is a TorchScript archive (torch.jit.save). Of the model that it was made of, "
                f"{_ADVICE}"
            )
        if "archive_format" in short or "serialized_exported_program.json" in short:
            raise _Unreadable(
                "is a program of torch.export: give torch.export.load(path) to fastres.compile, or "
                f"of the model, {_ADVICE}"
            )
        if PICKLE not in short:
            raise _Unreadable(f"is a zip file, but none of torch.save: {_ADVICE}")
        found = parts(archive)
        reader.read(pickled(archive, found))
        if not reader.asked.refusal:
            check_storages(reader.asked.storages.values(), found)


def _follow_pickles(file: BinaryIO, reader: Reader) -> None:
    """Likewise of files before PyTorch 1.6: a number, a version, a system, objects, storages."""
    file.seek(0)
    first = list(islice(pickletools.genops(file), 4))
    if first[-1][0].name != "STOP" or all(argument != _TORCH_SAVE for _, argument, _ in first):
        raise _Unreadable(f"is a bare pickle, which torch.save did not write: {_ADVICE}")
    for _ in range(3):
        reader.read(file)
    keys = reader.read(file)  # of the storages that follow, each behind its length
    if not reader.asked.refusal and not _lists(keys, reader.asked.storages):
        raise _Unreadable("is damaged: it has storages that are not filled, or others")
    wanted = sum(8 + storage.size for storage in reader.asked.storages.values())
    here = file.tell()
    if not reader.asked.refusal and wanted > file.seek(0, os.SEEK_END) - here:
        raise _Unreadable(f"is damaged: its storages take {wanted} bytes, which it does not have")


def _lists(keys: Any, storages: Collection[str]) -> bool:
    """Whether each storage is listed once: PyTorch leaves those that are not as memory was."""
    return isinstance(keys, list) and len(keys) == len(storages) and set(keys) == set(storages)


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
