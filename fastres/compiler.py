"""The corridor: capture → passes → choice of backend → lowering → engine, each done elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from fastres.backends.base import CompiledParts
from fastres.backends.segments import lower
from fastres.backends.select import Choice, check_names, choose, order
from fastres.calib.images import Preprocess
from fastres.calib.table import CalibrationTable
from fastres.engine import Engine
from fastres.engine_parts import Lowered, Origin
from fastres.errors import (
    BackendUnavailable,
    CaptureError,
    FastresError,
    InputError,
    UnsupportedError,
)
from fastres.graph.batching import check_split
from fastres.graph.ir import BatchNorm, Graph, identity
from fastres.graph.kinds import accepted
from fastres.graph.passes.fold_constants import fold_constants
from fastres.graph.passes.pipeline import optimise
from fastres.graph.renewing import renewed
from fastres.options import (
    EIGHT_BITS,
    PRECISION_OF,
    Hint,
    Input,
    OnUnsupported,
    Options,
    Oversize,
    PathLike,
    Precision,
    Sizes,
    as_device,
)
from fastres.quantizing import Calibration, opened, settled_precision, table_of
from fastres.source import (
    Inputs,
    Model,
    check_pictures,
    examples,
    source_of,
    taking_pictures,
)
from fastres.weights import is_finite


def compile(
    model: Model,
    inputs: Inputs | None = None,
    *,
    backend: str | Sequence[str] = "auto",
    precision: Precision | None = None,
    hint: Hint = "latency",
    device: str | torch.device | None = None,
    max_batch_size: int | None = None,
    oversize: Oversize = "split",
    preprocess: Preprocess | None = None,
    io_dtype: torch.dtype | None = None,
    on_unsupported: OnUnsupported = "error",
    verify: bool | None = None,
    threads: int | None = None,
    target: str | None = None,
    cuda_graph: bool | None = None,
    dependent_launch: bool | None = None,
    sync_launches: bool | None = None,
    tune: bool = False,
    cache_dir: PathLike | None = None,
    calibration: Calibration | None = None,
) -> Engine:
    """Compiles a trained residual network for inference.

    Args:
        model: an nn.Module in eval(), an ExportedProgram, or a Graph from `fastres.build`. What
            torch.compile and DataParallel put around a module is taken off.
        inputs: what the model is fed. A tensor is an example: its batch size is free, H and W are
            fixed. An `Input` can give ranges. Several come in a sequence, or by the names that the
            forward has for them. None takes (N, 3, 224, 224). Not for an ExportedProgram, which
            brings the sizes that it was exported for.
        backend: "auto" (triton with a GPU, else cpu), "cpu", "triton", "tensorrt", "reference", or
            a list that is tried in order; what was passed over, and why, is in `engine.info`.
        precision: "fp32", "tf32", "fp16", "bf16", "int8", "fp8" (triton, sm_89 and newer); None
            takes that of the model's parameters, or int8 with a calibration. Inputs and outputs
            keep the model's dtype whatever the precision.
        hint: "latency" gives one caller all cores, "throughput" serves several at a time.
        device: None takes the backend's own.
        max_batch_size: larger batches are run in parts, or refused with oversize="error".
        preprocess: how images become inputs; kept with the engine, used by `engine.predict`.
        io_dtype: torch.uint8 for an engine that is called with decoded pictures, uint8
            [N, H, W, 3] in RGB, and normalises them as `preprocess` says; resizing and cropping
            remain the caller's, and `inputs` is still what the model takes, [N, 3, H, W] of its
            dtype. None keeps the model's input.
        on_unsupported: "error" refuses a model with nodes that the backend does not take and lists
            them; "fallback" runs those in PyTorch and says so in `engine.info`.
        verify: cross-check against the model before returning: on calibration data, where they were
            given, else on random inputs. A failure names the first layer past its bound. None does
            so for tensorrt alone, two builds of which may differ in their numbers.
        threads: CPU threads; None takes every core this process may use.
        target: a GPU architecture that need not be here, such as "sm_90" (triton; with
            tensorrt-rtx those that it builds for): every kernel is compiled for it, and the engine
            can be looked at and saved, but not called; `fastres.load` on such a GPU runs it without
            choosing again.
        cuda_graph: whether a GPU's kernels are launched as one CUDA graph; None stands for True.
        dependent_launch: whether they are programmatic dependent launches, whose blocks may start
            before the kernel in front has ended (sm_90 and newer); None decides by how short they
            are.
        sync_launches: whether each launch on a GPU is named on stderr and waited for, which finds
            the one that breaks it, or hangs; None asks the environment: FASTRES_SYNC_LAUNCHES=1.
        tune: measure the kernels' tiles on this GPU for the usual input shapes, which takes minutes
            once; what is measured is kept, and an interrupted run goes on where it was.
        cache_dir: where measurements are kept; None takes `fastres` in the user's cache folder.
        calibration: for int8 and fp8: a table from `fastres.quantize`, the path of one, or batches
            of inputs as the model takes them, from which one is made with the "mse" thresholds.

    Returns:
        An `Engine`, called like the model.

    Raises:
        CaptureError: the model is in training mode, holds NaN, or does not export.
        InputError: an argument is out of range.
        BackendUnavailable, UnsupportedError: no backend can take the model; says why.
        ParityError: `verify` found a difference beyond the tolerance policy.
    """
    options = Options(
        backend=(backend,) if isinstance(backend, str) else backend,
        precision=precision,
        hint=hint,
        device=as_device(device),
        max_batch_size=max_batch_size,
        oversize=oversize,
        on_unsupported=on_unsupported,
        threads=threads,
        target=target,
        cuda_graph=cuda_graph,
        dependent_launch=dependent_launch,
        sync_launches=sync_launches,
        tune=tune,
        cache_dir=cast(str | None, cache_dir),
    )
    if target is not None and verify is True:
        raise InputError(f"verify needs a {target} GPU to run on: load the engine there and verify")
    check_names(options.backend)
    options = replace(options, precision=settled_precision(options.precision, calibration))
    check_pictures(preprocess, io_dtype)
    if not isinstance(verify, bool | None):
        raise InputError(f"verify is {verify!r}; give True, False or None")
    model = accepted(model)
    ranges = opened(calibration, model, inputs)
    source = source_of(model, inputs)
    table, shown = table_of(ranges, source)
    if io_dtype is not None:
        source = taking_pictures(source, preprocess)
    if source.largest_batch is not None:
        limit = min(source.largest_batch, options.max_batch_size or source.largest_batch)
        options = replace(options, max_batch_size=limit)
    engine = assemble(
        optimised(source.graph, CaptureError),
        Origin(without_values(source.graph, source.weights), source.ignored_weights),
        options,
        source.inputs,
        preprocess,
        table=table,
    )
    engine.notes += () if table is None else table.notes
    if verify or (verify is None and target is None and engine.backend.checked):
        from fastres.parity import verify as check

        reference = model if isinstance(model, torch.nn.Module) else source.graph
        data = shown if shown and io_dtype is None else examples(source)
        if not check(reference, engine, data).passed:  # once more, to say where
            quantised = engine.options.precision in EIGHT_BITS
            report = check(reference, engine, data, layerwise=quantised, bisect=not quantised)
            engine.close()
            report.raise_if_failed()
    return engine


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


def assemble(
    graph: Graph,
    origin: Origin,
    options: Options,
    inputs: tuple[Input, ...],
    preprocess: Preprocess | None = None,
    compiled: CompiledParts | None = None,
    table: CalibrationTable | None = None,
    prepared: tuple[Sizes, ...] | None = None,
) -> Engine:
    """Chooses a backend for an optimised graph, lowers it, and makes the engine.

    A backend that refuses the network only when it lowers it gives way to the next of the list.

    Args:
        compiled: what an executable of the same graph had to spare.
        table: to quantise the graph by, as the backend wants it.
        prepared: shapes that a file's engine is made ready for; nothing of it is run here.
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
                prepared,
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
    prepared: tuple[Sizes, ...] | None,
) -> Engine:
    """The engine on the backend that was chosen."""
    options = replace(options, device=choice.backend.device(options))
    if table is not None:
        assert options.precision is not None  # settled by `assemble`
        graph = choice.backend.quantise(graph, table, options.precision)
    usual = prepared or tuple(i.usual for i in inputs)
    if options.max_batch_size is not None and options.oversize == "split":
        check_split(graph, usual, options.max_batch_size, tried=prepared is None)
    promised = replace(options, promised_batch=max(i.largest[0] for i in inputs))
    executable, refused = lower(choice.backend, graph, promised, usual, compiled)
    return Engine(
        Lowered(graph, executable, refused),
        origin,
        choice.backend,
        options,
        inputs,
        preprocess,
        choice.passed_over,
    )


def with_weights(
    engine: Engine,
    state_dict: Mapping[str, Any] | PathLike,
    entry: str | None = None,
    max_bytes: int | None = None,
) -> Lowered:
    """The engine's graph anew from other weights, lowered to the same backend."""
    if engine.options.precision in EIGHT_BITS:
        raise InputError(
            f"an {engine.options.precision} engine keeps its weights: its calibration was made "
            "with them. Calibrate the model with the new ones and compile it again"
        )
    source = renewed(engine.source, engine.ignored_weights, state_dict, entry, max_bytes)
    graph = optimised(source, InputError)
    origin = Origin(engine.source, engine.ignored_weights)
    options = replace(engine.options, backend=(engine.backend.name,))
    compiled = engine.compiled_parts()
    return assemble(graph, origin, options, engine.inputs, compiled=compiled)._lowered
