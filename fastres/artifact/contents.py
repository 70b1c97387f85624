"""A saved engine: settings, graph and weights, without pickle and without a byte taken on trust.

    manifest.json        schema, versions, settings, and size and SHA-256 of the last three
    manifest.sha256      SHA-256 of the manifest
    graph.json           the graph that runs and the graph it was made from (graph/serial.py)
    weights.safetensors  the constants of the graph that runs, and what new weights do not bring
    compiled_*           what a backend compiled and may take back when the engine is loaded

The files lie in a folder, or in one zip if the path ends in `.fastres` (container.py). Digests
are checked before anything but the manifest is parsed, and saving the same engine twice gives the
same bytes. A digest shows damage, not who wrote a file; that nothing in it can run code of its own
is a matter of the strict decoding.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec
import safetensors.torch
import torch

from fastres.artifact.container import (
    MANIFEST,
    SEAL,
    Container,
    defect,
    open_container,
    place,
    seal,
)
from fastres.artifact.container import write as write_container
from fastres.artifact.manifest import (
    GRAPH,
    SCHEMA,
    WEIGHTS,
    FileEntry,
    check_files,
    checked,
    known_manifest,
    naming,
)
from fastres.artifact.preprocess import PreprocessEntry
from fastres.assembly.assemble import assemble
from fastres.assembly.parts import Origin, Parts
from fastres.backends.base import CompiledParts
from fastres.backends.select import BACKENDS
from fastres.calib.images import Preprocess
from fastres.errors import BackendUnavailable, GraphError, InputError
from fastres.graph import serial
from fastres.graph.allowance import Allowance
from fastres.graph.ir import Graph
from fastres.graph.specs import DTYPE_NAMES, DTYPES
from fastres.options import (
    DTYPE_OF,
    EIGHT_BITS,
    Hint,
    Input,
    OnUnsupported,
    Options,
    Oversize,
    PathLike,
    Precision,
    Sizes,
)
from fastres.tolerances import FLOOR
from fastres.version import __version__


class InputEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An `Input`, its dtype by name."""

    smallest: tuple[int, ...]
    usual: tuple[int, ...]
    largest: tuple[int, ...]
    dtype: str | None
    format: Literal["NCHW"]
    name: str | None


class OptionsEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`Options`, with the backend that was chosen; the device is chosen anew when loading.

    `target` says what the engine was built for; it is not asked for again.
    """

    backend: str
    precision: Precision
    hint: Hint
    max_batch_size: int | None
    oversize: Oversize
    on_unsupported: OnUnsupported
    threads: int | None
    cache_size: int
    target: str | None = None
    cuda_graph: bool | None = None
    dependent_launch: bool | None = None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of manifest.json; `versions` and `tolerance` are for people to read."""

    format: Literal["fastres-engine"]
    schema: int
    versions: dict[str, str]
    files: dict[str, FileEntry]
    options: OptionsEntry
    inputs: tuple[InputEntry, ...]
    preprocess: PreprocessEntry | None
    ignored_weights: tuple[str, ...]
    tolerance: str


@dataclass(frozen=True)
class Contents:
    """What an engine is made of; see `Engine`, and `Executable.compiled`."""

    graph: Graph
    source: Graph
    options: Options
    inputs: tuple[Input, ...]
    preprocess: Preprocess | None = None
    ignored_weights: tuple[str, ...] = ()
    compiled: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # on what a file names and this process does not know
    size: int = 0  # bytes of the file that it was read from


def restored(
    path: PathLike,
    *,
    device: torch.device | None = None,
    target: str | None = None,
    trust_engine: bool = False,
    allow_aten: bool = True,
    max_bytes: int | None = None,
) -> Parts:
    """What an engine is made of, read and lowered for a backend; see `fastres.load`."""
    contents = read(path, allow_aten=allow_aten)
    allowance = Allowance(contents.size, max_bytes)
    shapes = _affordable(contents, allowance, place(path))
    try:
        with naming(place(path)):
            parts = assemble(
                contents.graph,
                Origin(contents.source, contents.ignored_weights, shapes),
                replace(contents.options, device=device, target=target),
                contents.inputs,
                contents.preprocess,
                CompiledParts(contents.compiled, trust_engine),
            )
        return replace(parts, notes=contents.notes, allowance=allowance)
    except BackendUnavailable as error:
        built_for = contents.options.target
        if built_for is None or target is not None:
            raise
        raise BackendUnavailable(
            f"this engine was built for {built_for}: load it on a machine with such a GPU; "
            f"target={built_for!r} (fastres inspect --target {built_for}) opens it here, to be "
            f"looked at\n{error}"
        ) from error


def _affordable(contents: Contents, allowance: Allowance, path: Path) -> tuple[Sizes, ...]:
    """For which shapes an engine is made ready: the usual ones, or the smallest if these are less.

    Raises:
        ArtifactError: even these would take more than the file may.
    """
    usual = tuple(entry.usual for entry in contents.inputs)
    smallest = tuple((1, *entry.smallest[1:]) for entry in contents.inputs)
    for shapes in (usual, smallest):
        try:
            for graph in (contents.graph, contents.source):
                allowance.check(graph, shapes)
            return shapes
        except GraphError as error:
            if shapes == smallest:
                raise defect(path, str(error)) from error
    raise AssertionError("one of both was tried last")


def write(contents: Contents, path: PathLike) -> None:
    """Writes an artifact; `read` gives equal contents back.

    Raises:
        ArtifactError: see `Engine.save`.
    """
    where = place(path)
    try:
        graph, tensors = serial.encode(contents.graph, contents.source)
        # what could not be loaded again is not saved
        serial.decode(graph, tensors, _sizes(contents.inputs))
        files = {GRAPH: graph, WEIGHTS: safetensors.torch.save(tensors), **contents.compiled}
        manifest = serial.canonical(_manifest(contents, files), Manifest)
    except (GraphError, msgspec.MsgspecError, TypeError) as error:
        raise defect(where, f"this engine cannot be saved: {error}") from error
    text = msgspec.json.format(manifest, indent=2)
    write_container(where, {MANIFEST: text, SEAL: seal(text), **files})


def read(path: PathLike, *, allow_aten: bool = True) -> Contents:
    """Reads an artifact without lowering it for a backend.

    Args:
        allow_aten: see `fastres.load`.

    Raises:
        ArtifactError: as `fastres.load`.
    """
    container = open_container(place(path))
    manifest = _read_manifest(container)
    files = {name: checked(container, name, entry) for name, entry in manifest.files.items()}
    try:
        tensors = safetensors.torch.load(files[WEIGHTS])
    except Exception as error:  # safetensors raises its own kinds, torch others
        raise defect(container.path, f"{WEIGHTS} cannot be read: {error}") from error
    try:
        inputs = tuple(_input(entry) for entry in manifest.inputs)
        graph, source, notes = serial.decode(files[GRAPH], tensors, _sizes(inputs), allow_aten)
        options = _options(manifest.options)
        entry = manifest.preprocess
        preprocess = None if entry is None else entry.opened()
    except (GraphError, ValueError) as error:
        raise defect(container.path, f"its content contradicts itself: {error}") from error
    if source.inputs != graph.inputs:
        raise defect(container.path, "the graph and its source have different inputs")
    compiled = {name: data for name, data in files.items() if name not in (GRAPH, WEIGHTS)}
    return Contents(
        graph,
        source,
        options,
        inputs,
        preprocess,
        manifest.ignored_weights,
        compiled,
        notes,
        sum(container.sizes.values()),
    )


def _manifest(contents: Contents, files: Mapping[str, bytes]) -> Manifest:
    options = contents.options
    assert options.precision is not None  # an engine has it resolved
    floor = FLOOR[DTYPE_OF[options.precision]]
    return Manifest(
        format="fastres-engine",
        schema=SCHEMA,
        versions={
            "fastres": __version__,
            "torch": str(torch.__version__),
            "openvino": _version("openvino"),
        },
        files={
            name: FileEntry(len(data), hashlib.sha256(data).hexdigest())
            for name, data in files.items()
        },
        options=OptionsEntry(
            backend=options.backend[0],
            precision=options.precision,
            hint=options.hint,
            max_batch_size=options.max_batch_size,
            oversize=options.oversize,
            on_unsupported=options.on_unsupported,
            threads=options.threads,
            cache_size=options.cache_size,
            target=options.target,
            cuda_graph=options.cuda_graph,
            dependent_launch=options.dependent_launch,
        ),
        inputs=tuple(
            InputEntry(
                i.smallest,
                i.usual,
                i.largest,
                None if i.dtype is None else DTYPE_NAMES[i.dtype],
                i.format,
                i.name,
            )
            for i in contents.inputs
        ),
        preprocess=PreprocessEntry.of(contents.preprocess),
        ignored_weights=contents.ignored_weights,
        tolerance=(
            f"relative to the RMS of a float64 oracle: at most twice PyTorch's own error in "
            f"{'8 bits' if options.precision in EIGHT_BITS else options.precision}, or {floor:g}"
        ),
    )


def _sizes(inputs: Sequence[Input]) -> list[Sizes]:
    return [entry.usual for entry in inputs]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _read_manifest(container: Container) -> Manifest:
    text = known_manifest(container)
    try:
        manifest = serial.strict(text, Manifest)
    except GraphError as error:
        raise defect(container.path, f"{MANIFEST} cannot be read: {error}") from error
    check_files(container, manifest.files)
    if manifest.options.backend not in BACKENDS:
        raise defect(
            container.path,
            f"made for the backend {manifest.options.backend!r}; this fastres "
            f"({__version__}) has {', '.join(BACKENDS)}",
        )
    return manifest


def _input(entry: InputEntry) -> Input:
    if entry.dtype is not None and entry.dtype not in DTYPES:
        raise InputError(f"an input has the dtype {entry.dtype!r}; known are {', '.join(DTYPES)}")
    fixed = entry.smallest == entry.usual == entry.largest
    return Input(
        entry.usual if fixed else (entry.smallest, entry.usual, entry.largest),
        None if entry.dtype is None else DTYPES[entry.dtype],
        entry.format,
        entry.name,
    )


def _options(entry: OptionsEntry) -> Options:
    settings = msgspec.structs.asdict(entry)
    return Options(**{**settings, "backend": (entry.backend,)})
