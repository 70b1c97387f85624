"""An optimised graph → what an engine is made of: a backend is chosen and the graph lowered to it.

Knows no `Engine`: compiling, loading, calibrating and taking new weights each put one around it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from fastres.assembly.parts import Lowered, Origin, Parts
from fastres.backends.base import CompiledParts
from fastres.backends.segments import lower
from fastres.backends.select import Choice, choose, order
from fastres.calib.images import Preprocess
from fastres.calib.table import CalibrationTable
from fastres.errors import BackendUnavailable, FastresError, InputError, UnsupportedError
from fastres.graph.batching import check_split
from fastres.graph.ir import BatchNorm, Graph, identity
from fastres.graph.passes.fold_constants import fold_constants
from fastres.graph.passes.pipeline import optimise
from fastres.graph.renewing import renewed
from fastres.options import EIGHT_BITS, PRECISION_OF, Input, Options, PathLike
from fastres.weights import is_finite


def assemble(
    graph: Graph,
    origin: Origin,
    options: Options,
    inputs: tuple[Input, ...],
    preprocess: Preprocess | None = None,
    compiled: CompiledParts | None = None,
    table: CalibrationTable | None = None,
) -> Parts:
    """Chooses a backend for an optimised graph, and lowers it.

    A backend that refuses the network only when it lowers it gives way to the next of the list.

    Args:
        compiled: what an executable of the same graph had to spare.
        table: to quantise the graph by, as the backend wants it.
    """
    precision = options.precision or PRECISION_OF[graph.floating_dtype]
    wanted = options
    passed_over: tuple[str, ...] = ()
    while True:
        try:
            choice = choose(graph, wanted, precision, compiled)
        except (BackendUnavailable, UnsupportedError) as error:
            raise type(error)("\n".join([*passed_over, str(error)])) from error
        passed_over += choice.passed_over
        try:
            return _assembled(
                replace(choice, passed_over=passed_over),
                graph,
                origin,
                replace(options, precision=precision),
                inputs,
                preprocess,
                compiled,
                table,
            )
        except UnsupportedError as error:
            names = order(wanted.backend, wanted.device, wanted.target)
            left = names[names.index(choice.backend.name) + 1 :]
            if not left:
                raise
            wanted = replace(wanted, backend=left)
            passed_over += (f"{choice.backend.name} refuses the network: {error}",)


def _assembled(
    choice: Choice,
    graph: Graph,
    origin: Origin,
    options: Options,
    inputs: tuple[Input, ...],
    preprocess: Preprocess | None,
    compiled: CompiledParts | None,
    table: CalibrationTable | None,
) -> Parts:
    """On the backend that was chosen."""
    options = replace(options, device=choice.backend.device(options))
    if table is not None:
        assert options.precision is not None  # settled by `assemble`
        graph = choice.backend.quantise(graph, table, options.precision)
    usual = origin.prepared or tuple(i.usual for i in inputs)
    if options.max_batch_size is not None and options.oversize == "split":
        check_split(graph, usual, options.max_batch_size, tried=origin.prepared is None)
    promised = replace(options, promised_batch=max(i.largest[0] for i in inputs))
    executable, refused = lower(choice.backend, graph, promised, usual, compiled)
    return Parts(
        Lowered(graph, executable, refused),
        origin,
        choice.backend,
        options,
        inputs,
        preprocess,
        choice.passed_over,
        () if table is None else table.notes,
    )


def with_weights(
    parts: Parts,
    state_dict: Mapping[str, Any] | PathLike,
    entry: str | None = None,
    max_bytes: int | None = None,
) -> Lowered:
    """The graph anew from other weights, lowered to the same backend."""
    if parts.options.precision in EIGHT_BITS:
        raise InputError(
            f"an {parts.options.precision} engine keeps its weights: its calibration was made "
            "with them. Calibrate the model with the new ones and compile it again"
        )
    origin = parts.origin
    source = renewed(origin.graph, origin.ignored_weights, state_dict, entry, max_bytes)
    graph = optimised(source, InputError)
    options = replace(parts.options, backend=(parts.backend.name,))
    compiled = parts.lowered.executable.compiled()
    return assemble(graph, origin, options, parts.inputs, compiled=compiled).lowered


def optimised(source: Graph, error: type[FastresError]) -> Graph:
    """The graph that is to be lowered, with constants of its own; all its layers' are finite."""
    _check_statistics(source, error)
    graph = optimise(source)
    weights = graph.taken_as_weights
    for name, tensor in graph.constants.items():
        if name in weights and tensor.is_floating_point() and not is_finite(tensor):
            raise error(
                f"{name} is infinite, or overflows {tensor.dtype} when BatchNorm is folded into "
                "it: the model's weights or statistics are out of any sensible range. Load sound "
                "weights first"
            )
    return _detached(graph, source)


def _check_statistics(graph: Graph, error: type[FastresError]) -> None:
    norms = [node for node in graph.nodes if isinstance(node.op, BatchNorm)]
    named = {n for node in norms for n in node.params.values()}
    if not graph.constants.keys() >= named:  # some are computed
        _check_statistics(fold_constants(graph), error)
        return
    for node in norms:
        assert isinstance(node.op, BatchNorm)
        negative = int((graph.constants[node.params["var"]] + node.op.eps <= 0).sum())
        if negative:
            raise error(
                f"{node.params['var']} holds {negative} variances that are negative, or zero "
                "without an eps: BatchNorm gives NaN for them. Load sound weights first"
            )
        infinite = [n for n in node.params.values() if not is_finite(graph.constants[n])]
        if infinite:
            raise error(f"{infinite[0]} holds infinite values. Load sound weights first")


def _detached(graph: Graph, source: Graph) -> Graph:
    """Copies the constants still in the model's memory, which may go on training.

    Laid out as those of a loaded engine will be: by their strides, as PyTorch's kernels look at
    those of a 1x1 filter in channels_last, which `is_contiguous` takes for plain.
    """
    shared = {_memory(tensor) for tensor in source.constants.values()}

    def own(tensor: torch.Tensor) -> torch.Tensor:
        plain = tensor.stride() == torch.empty(tensor.shape, device="meta").stride()
        keeps = plain and _memory(tensor) not in shared
        return tensor if keeps else tensor.clone(memory_format=torch.contiguous_format)

    return _each_constant(graph, own)


def without_values(graph: Graph, names: Collection[str] | None = None) -> Graph:
    """The same graph with its constants, or those named, on the meta device.

    With them goes what lies in their memory, such as a buffer that is a view of a weight: new
    weights would change it in the model, so an engine must not keep its values.
    """
    constants = graph.constants
    gone = {_memory(t) for n, t in constants.items() if names is None or n in names}
    return _each_constant(graph, lambda t: t.to("meta") if _memory(t) in gone else t.clone())


def _memory(tensor: torch.Tensor) -> object:
    return identity(tensor) if tensor.is_meta else tensor.untyped_storage().data_ptr()


def _each_constant(graph: Graph, change: Callable[[torch.Tensor], torch.Tensor]) -> Graph:
    """Changes every constant once, so that names tied to one tensor stay tied."""
    changed: dict[tuple[object, ...], torch.Tensor] = {}
    constants = {}
    for name, tensor in graph.constants.items():
        key = identity(tensor)
        if key not in changed:
            changed[key] = change(tensor)
        constants[name] = changed[key]
    return graph.replace(constants=constants)
