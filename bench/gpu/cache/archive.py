"""Machine code made where there is no GPU, in one file: packed there, found by Triton's cache here.

What Triton reads of a kernel that it has compiled before is its machine code and its metadata, by
the names in a group file; the sources and the stages between are left out. Where they lie is
written by Triton's own cache at unpacking, so any folder will do. The key of a kernel is a digest
of Triton's own (its version, its Python sources, its library) and of the rest: the kernel's source
and line, its arguments' types, its constants, compiler options, ptxas and target. The rest is
packed as text, Triton's own is put in front of it here. Its library is built for each version of
Python from the same sources: it alone may be another.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import platform
import re
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import triton
from triton import knobs
from triton._C import libtriton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.compiler.compiler import make_backend
from triton.runtime import build
from triton.runtime.cache import get_cache_key, get_cache_manager, triton_key

from fastres.kernels.aot import compile_kernel, source_of
from fastres.kernels.launch import Launch, settle_key

LIMIT = 40 * 2**20  # bytes of an archive
PIECE = 8 * 2**20  # bytes that are compressed together
_LAST = 2**18  # bytes that are kept for the end
_LAUNCHER = "__triton_launcher"  # what Triton 3.6 calls the C that starts a kernel
_DAMAGED = (
    *(OSError, EOFError, StopIteration),
    *(lzma.LZMAError, tarfile.TarError, msgspec.MsgspecError),
)
_PTXAS = re.compile(r"\bV([\d.]+)")
_WORDS = {
    "triton": "Triton",
    "sources": "the Python sources of Triton",
    "target": "sm and ptxas",
    "options": "the compiler's options",
    "environment": "variables that Triton compiles by",
}


class Key(msgspec.Struct, frozen=True):
    """What machine code was made with; all but the last two must be the same here.

    Args:
        triton: version.
        sources: digest of the Python files of Triton that are part of its key.
        target: sm, and what ptxas says of itself.
        options: digest of the compiler's options where a launch names none.
        environment: variables that change what is compiled, and their values.
        library: digest of Triton's library.
        python: version that the library is built for.
    """

    triton: str
    sources: str
    target: str
    options: str
    environment: str
    library: str
    python: str


class Kernel(NamedTuple):
    """One kernel as it is packed.

    Args:
        name: of its files.
        rest: of its key, behind Triton's own.
        metadata: Triton's, as JSON.
        cubin: machine code.
        source: module and name of the jit function, and the digest of its source.
        launcher: the C that starts it, where Triton builds one for each signature; else empty.
    """

    name: str
    rest: str
    metadata: bytes
    cubin: bytes
    source: tuple[str, str]
    launcher: str


class Made(msgspec.Struct):
    """What stands at the end of an archive.

    Args:
        sources: digests of jit functions' sources, by "module:name".
        launchers: C of launchers.
    """

    sources: dict[str, str] = {}
    launchers: list[str] = []


def key_here(sm: int) -> Key:
    """The key of this machine's Triton for sm_`sm`."""
    library = _library()
    backend = make_backend(GPUTarget("cuda", sm, 32))
    assembler = backend.hash()  # all that ptxas says of itself
    version = "".join(_PTXAS.findall(assembler)[:1])
    return Key(
        triton=triton.__version__,
        sources=_digest(triton_key().replace(library, "")),
        target=f"sm_{sm}, ptxas {version}, {_digest(assembler)}",
        options=_digest(backend.parse_options({}).hash()),
        environment=str(sorted(libtriton.get_cache_invalidating_env_vars().items())),
        library=library,
        python=".".join(platform.python_version_tuple()[:2]),
    )


@cache
def _library() -> str:
    return hashlib.sha256(Path(libtriton.__file__).read_bytes()).hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def unfit(made: Key, here: Key) -> str | None:
    """Why machine code does not fit, in words; None if it does."""
    found = [
        f"{words} ({getattr(made, field)[:40]}; here {getattr(here, field)[:40]})"
        for field, words in _WORDS.items()
        if getattr(made, field) != getattr(here, field)
    ]
    return f"made with another of: {', '.join(found)}" if found else None


def kernel_of(launch: Launch, sm: int) -> Kernel:
    """Compiles a launch, or finds it in Triton's cache, and reads what is packed of it."""
    kernel, source = compile_kernel(launch, sm), source_of(launch)
    backend = make_backend(GPUTarget("cuda", sm, 32))
    options = backend.parse_options(dict(launch.options))
    variables = libtriton.get_cache_invalidating_env_vars()
    key = get_cache_key(source, backend, options, variables)
    if hashlib.sha256(key.encode()).hexdigest() != kernel.hash:
        raise RuntimeError(f"Triton {triton.__version__} makes its keys in another way")
    function = launch.kernel
    name, path = next((k, p) for k, p in kernel.metadata_group.items() if k.endswith(".json"))
    launcher = ""
    if hasattr(driver, "make_launcher"):
        meta = getattr(kernel.metadata, "tensordesc_meta", None)
        launcher = driver.make_launcher(source.constants, dict(source.signature), meta)
    return Kernel(
        name.removesuffix(".json"),
        key.removeprefix(triton_key()),
        Path(path).read_bytes(),
        kernel.asm["cubin"],
        (f"{function.__module__}:{function.__name__}", function.cache_key),
        launcher,
    )


class Archive:
    """An archive that is being written: kernels in order of promise, as many as there is room for.

    Args:
        limit: bytes that the file may have.
    """

    def __init__(self, path: Path, key: Key, limit: int = LIMIT) -> None:
        self.kernels = self.bytes = 0
        self.full = False
        self._path, self._limit = path, limit
        self._fresh = path.with_name(f"{path.name}.new")
        self._fresh.write_bytes(b"")
        self._known: set[str] = set()
        self._made = Made()
        self._waiting, self._count = io.BytesIO(), 0
        self._put("key.json", msgspec.json.encode(key))
        self._append(lzma.compress(self._waiting.getvalue()))
        self._waiting = io.BytesIO()

    @property
    def launchers(self) -> int:
        return len(self._made.launchers)

    def add(self, kernel: Kernel) -> None:
        """One kernel, once."""
        if kernel.rest in self._known or self.full:
            return
        self._known.add(kernel.rest)
        facts = {"name": kernel.name, "rest": kernel.rest, "metadata": msgspec.Raw(kernel.metadata)}
        self._put("kernel.json", msgspec.json.encode(facts))
        self._put("kernel.cubin", kernel.cubin)
        self._made.sources.update([kernel.source])
        if kernel.launcher and kernel.launcher not in self._made.launchers:
            self._made.launchers.append(kernel.launcher)
        self._count += 1
        if self._waiting.tell() >= PIECE:
            self.flush()

    def close(self) -> None:
        """Writes what is left; only now the file is there under its name."""
        self.flush()
        self._put("made.json", msgspec.json.encode(self._made))
        self._append(lzma.compress(self._waiting.getvalue() + bytes(2 * tarfile.BLOCKSIZE)))
        os.replace(self._fresh, self._path)

    def _put(self, name: str, data: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        padding = bytes(-len(data) % tarfile.BLOCKSIZE)
        self._waiting.write(entry.tobuf(tarfile.USTAR_FORMAT) + data + padding)

    def flush(self) -> None:
        """Writes what waits, or finds that there is no room for it and that the archive is full.

        Pieces are streams of their own, which readers of .xz take for one.
        """
        data = lzma.compress(self._waiting.getvalue())
        if self.bytes + len(data) <= self._limit - min(_LAST, self._limit // 8):
            self._append(data)
            self.kernels += self._count
        else:
            self.full = True
        self._waiting, self._count = io.BytesIO(), 0

    def _append(self, data: bytes) -> None:
        self.bytes += len(data)
        with self._fresh.open("ab") as file:
            file.write(data)


def unpack(path: Path, folder: Path, sm: int) -> dict[str, Any]:
    """Puts an archive into a folder that Triton will look into, if it fits.

    Args:
        folder: what is there stays.
        sm: of the GPU that is here.

    Returns:
        A row: how many kernels there are now, which sources changed since they were compiled (those
        are compiled anew), and how many launchers were built; or why nothing was unpacked.
    """
    row: dict[str, Any] = {"name": path.name}
    started = time.perf_counter()
    try:
        with lzma.open(path) as opened, tarfile.open(fileobj=opened, mode="r|") as archive:
            entries = _entries(archive)
            made, here = msgspec.json.decode(next(entries)[1], type=Key), key_here(sm)
            why = unfit(made, here)
            if why is not None:
                return row | {"refused": why}
            if made.library != here.library:
                row["note"] = (
                    f"Triton's library is another build, for Python {made.python} there and "
                    f"{here.python} here; all else of its key is the same"
                )
            row["kernels"], last = _unpacked(entries, folder)
    except _DAMAGED as error:
        return row | {"refused": f"cannot be read: {type(error).__name__}: {error}"}
    row |= {"changed": _changed(last.sources), **_launchers(last.launchers, folder)}
    return row | {"seconds": time.perf_counter() - started}


def _entries(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for entry in archive:
        file = archive.extractfile(entry)
        assert file is not None  # nothing but files is packed
        yield entry.name, file.read()


class _Facts(msgspec.Struct):
    name: str
    rest: str
    metadata: msgspec.Raw


def _unpacked(entries: Iterator[tuple[str, bytes]], folder: Path) -> tuple[int, Made]:
    """The kernels of an archive, and its end."""
    own, pending = triton_key(), []
    with knobs.cache.scope(), ThreadPoolExecutor(8) as pool:
        knobs.cache.dir = str(folder.resolve())
        for name, data in entries:
            if name == "made.json":
                count = sum(future.result() for future in pending)
                return count, msgspec.json.decode(data, type=Made)
            facts, (_, cubin) = msgspec.json.decode(data, type=_Facts), next(entries)
            pending.append(pool.submit(_put, facts, own, cubin))
    raise EOFError("it has no end")


def _put(facts: _Facts, own: str, cubin: bytes) -> int:
    manager = get_cache_manager(hashlib.sha256((own + facts.rest).encode()).hexdigest())
    name = f"{facts.name}.json"
    if not manager.get_group(name):
        paths = {
            file: manager.put(data, file)
            for file, data in ((f"{facts.name}.cubin", cubin), (name, bytes(facts.metadata)))
        }
        manager.put_group(name, paths)  # last: without it, nothing is there
    return 1


def _changed(sources: Mapping[str, str]) -> list[str]:
    """Kernels whose source, or that of what they call, is another here; but for those of tests."""
    changed = []
    for place, digest in sorted(sources.items()):
        module, name = place.split(":")
        if module.startswith(("fastres.", "bench.")):
            function = getattr(import_module(module), name, None)
            settle_key(function)
            changed += [name] if getattr(function, "cache_key", digest) != digest else []
    return changed


def _launchers(sources: Sequence[str], folder: Path) -> dict[str, Any]:
    """Builds launchers that are not there yet, on every core; else the first launch of each waits.

    They are no part of what is packed: they belong to this machine's Python.
    """
    if not sources:
        return {}

    def build_one(source: str) -> None:
        build.compile_module_from_src(
            source, _LAUNCHER, driver.library_dirs(), driver.include_dirs, driver.libraries
        )

    with knobs.cache.scope(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        knobs.cache.dir = str(folder.resolve())
        pending = [pool.submit(build_one, source) for source in sources]
    failed = [str(error) for future in pending if (error := future.exception())]
    row: dict[str, Any] = {"launchers": len(sources) - len(failed)}
    return row | ({"launchers_not_built": f"{len(failed)}: {failed[0][:200]}"} if failed else {})
