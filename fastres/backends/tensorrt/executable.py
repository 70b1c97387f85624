"""What the TensorRT backend lowers to: engines by ranges of input shapes, built, kept, run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastres.backends.base import Account, CompiledParts, NodeTime, elsewhere
from fastres.backends.shape_cache import ShapeCache, Shapes
from fastres.backends.tensorrt.api import Api
from fastres.backends.tensorrt.build import build
from fastres.backends.tensorrt.layers import notes_on, precisions
from fastres.backends.tensorrt.plan import Built, Layer, Range
from fastres.backends.tensorrt.run import TensorRtRunner
from fastres.backends.tensorrt.stored import Origin, as_ranges, digest, usable, write_plan
from fastres.calib.files import write_whole
from fastres.graph import onnx as onnx_form
from fastres.graph.ir import Graph
from fastres.graph.onnx_writer import output_names
from fastres.graph.shapes import infer_shapes
from fastres.graph.specs import Sym
from fastres.options import Options, cache_folder

_log = logging.getLogger(__name__)
_BATCH = 32  # an engine takes at least this many images, unless max_batch_size says fewer


class TensorRtExecutable:
    """Engines for ranges of batch sizes, one for each other set of input sizes.

    Args:
        shapes: built for at once; engines for others are built when they are first needed.
        compiled: of a saved engine; see `fastres.backends.tensorrt.stored`.
    """

    def __init__(
        self,
        api: Api,
        graph: Graph,
        options: Options,
        device: torch.device,
        shapes: Shapes,
        compiled: CompiledParts | None,
    ) -> None:
        self._api = api
        self._graph = graph
        self._options = options
        self._device = device
        self._parts = compiled or CompiledParts()
        self._notes: list[str] = []
        self._batched = all(v.spec.shape[:1] == (Sym("N"),) for v in graph.inputs)
        if self._batched and options.max_batch_size is not None:  # larger ones come in parts
            shapes = tuple((min(n, options.max_batch_size), *rest) for n, *rest in shapes)
        self._usual = shapes
        self._half = options.precision in ("fp16", "int8")
        self._pictures = () if graph.normalize is None else graph.normalize.inputs
        self._onnx = onnx_form.to_bytes(graph, half=self._half)
        self._network = digest(self._onnx)
        self._engines: ShapeCache[_Engine] = ShapeCache(options.cache_size)
        self._engine(shapes)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        shapes = tuple(tuple(x.shape) for x in inputs)
        engine = self._engine(shapes)
        given = onnx_form.inputs_for(self._graph, inputs)
        return engine.runner(self._runner).run(given, self._output_shapes(shapes))

    def precisions(self) -> dict[str, str]:
        """As TensorRT's layers have them.

        To it TF32 is a way to multiply, not a type: a layer of floats is said to have run in tf32
        where that was asked for, though a kernel may still have multiplied in full.
        """
        found = precisions(self._graph, self._engines.latest().built.layers)
        if self._options.precision != "tf32":
            return found
        return {name: "tf32" if kind == "fp32" else kind for name, kind in found.items()}

    def profile(self, inputs: Sequence[torch.Tensor]) -> list[NodeTime]:
        shapes = tuple(tuple(x.shape) for x in inputs)
        engine = self._engine(shapes)
        given, outputs = onnx_form.inputs_for(self._graph, inputs), self._output_shapes(shapes)
        return engine.runner(self._runner).profile(given, outputs, engine.built.layers)

    def account(self) -> Account:
        layers = self._engines.latest().built.layers
        made = f"{self._api} made {len(layers)} layers of {len(self._graph.nodes)} nodes"
        return Account(notes=(*self._notes, made, *notes_on(self._graph, layers)))

    def compiled(self) -> CompiledParts:
        engine = self._engine(self._usual)
        return CompiledParts(write_plan(engine.origin, engine.built), trusted=True)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Of the engine used last."""
        return self._engines.latest().built.layers

    def _output_shapes(self, shapes: Shapes) -> list[tuple[int, ...]]:
        sizes = infer_shapes(self._graph, shapes)
        return [tuple(sizes[name]) for name in self._graph.outputs]

    def _largest(self, shapes: Shapes) -> Shapes:
        """The inputs of the engine that serves these: as many images as it takes."""
        if not self._batched:
            return shapes
        n = max(_BATCH, self._usual[0][0], self._options.promised_batch or 1)
        if self._options.max_batch_size is not None:
            n = self._options.max_batch_size
        while n < shapes[0][0]:
            n *= 2
        return tuple((n, *shape[1:]) for shape in shapes)

    def _engine(self, shapes: Shapes) -> _Engine:
        return self._engines.get(self._largest(shapes), self._make)

    def _make(self, largest: Shapes) -> _Engine:
        ranges = self._ranges(largest)
        origin = self._origin(ranges)
        target = self._options.target
        built, why_not = usable(self._parts, origin, runs=target is None)
        if why_not is not None:
            self._notes.append(why_not)
            _log.warning(why_not)
        if built is None:
            cache = self._timing_cache()
            built = build(
                self._api,
                self._onnx,
                ranges,
                tf32=self._options.precision == "tf32",
                target=target,
                timing_cache=_read(cache),
            )
            if cache is not None and built.timing_cache:
                _keep(cache, built.timing_cache)
        engine = _Engine(origin, built)
        if target is None:
            layers = engine.runner(self._runner).layers()
            engine.built = replace(built, layers=layers or built.layers)
        return engine

    def _runner(self, plan: bytes) -> TensorRtRunner:
        if self._options.target is not None:
            raise elsewhere(self._options.target)
        from fastres.backends.triton.running.timing import recorder

        names = [value.name for value in self._graph.inputs], output_names(self._graph)
        record = None if self._options.cuda_graph is False else recorder(self._device)
        limit = self._options.cache_size
        return TensorRtRunner(self._api, plan, names, self._device, record, limit)

    def _ranges(self, largest: Shapes) -> dict[str, Range]:
        found = {}
        for value, shape, usual in zip(self._graph.inputs, largest, self._usual, strict=True):
            free = value.spec.shape[:1] == (Sym("N"),)
            smallest = (1, *shape[1:]) if free else shape
            likely = (min(usual[0], shape[0]), *shape[1:])
            if value.name in self._pictures:
                smallest, likely, shape = ((n, h, w, c) for n, c, h, w in (smallest, likely, shape))
            found[value.name] = Range(smallest, likely, shape)
        return found

    def _origin(self, ranges: dict[str, Range]) -> Origin:
        target = self._options.target
        return Origin(
            builder=str(self._api),
            architecture=target or architecture_of(self._device),
            gpu="" if target else torch.cuda.get_device_name(self._device),
            ranges=as_ranges(ranges),
            settings=str(self._options.precision),
            network=self._network,
        )

    def _timing_cache(self) -> Path | None:
        """Where the builder's measurements on this kind of GPU are kept."""
        if self._api.is_rtx or self._options.target is not None:
            return None
        gpu = torch.cuda.get_device_name(self._device)
        words = f"{self._api} {gpu}".lower().split()
        name = "_".join("".join(c if c.isalnum() else "_" for c in word) for word in words)
        return cache_folder(self._options.cache_dir) / f"timings_{name}.bin"


def architecture_of(device: torch.device) -> str:
    """Such as "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


class _Engine:
    """A built engine, and its runner once it is to run."""

    def __init__(self, origin: Origin, built: Built) -> None:
        self.origin = origin
        self.built = built
        self._making = threading.Lock()
        self._runner: TensorRtRunner | None = None

    def runner(self, make: Callable[[bytes], TensorRtRunner]) -> TensorRtRunner:
        with self._making:
            if self._runner is None:
                self._runner = make(self.built.plan)
            return self._runner


def _read(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError:
        return None  # there is none yet


def _keep(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:  # the engine is fine; only the next build takes as long
        _log.warning("the timing cache %s cannot be written: %s", path, error)
