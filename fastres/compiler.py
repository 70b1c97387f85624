"""The corridor: capture → passes → choice of backend → lowering → engine, each done elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch

from fastres.assembly.assemble import assemble, optimised, without_values
from fastres.assembly.parts import Origin
from fastres.backends.select import check_names
from fastres.calib.images import Preprocess
from fastres.engine.engine import Engine
from fastres.errors import CaptureError, InputError
from fastres.graph.kinds import accepted
from fastres.options import (
    EIGHT_BITS,
    Hint,
    OnUnsupported,
    Options,
    Oversize,
    PathLike,
    Precision,
    as_device,
)
from fastres.quantization.quantize import Calibration, opened, settled_precision, table_of
from fastres.source import (
    Inputs,
    Model,
    check_pictures,
    examples,
    source_of,
    taking_pictures,
)


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
        backend: "auto" (triton with a GPU, else cpu), "cpu", "triton", "tensorrt", "reference",
            "onnxruntime", or a list that is tried in order; what was passed over, and why, is in
            `engine.info`.
        precision: "fp32", "tf32", "fp16", "bf16", "int8", "fp8" (triton on sm_89 and newer,
            reference); None takes that of the model's parameters, or int8 with a calibration.
            Inputs and outputs keep the model's dtype whatever the precision.
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
    engine = Engine(
        assemble(
            optimised(source.graph, CaptureError),
            Origin(without_values(source.graph, source.weights), source.ignored_weights),
            options,
            source.inputs,
            preprocess,
            table=table,
        )
    )
    if verify or (verify is None and target is None and engine.backend.checked):
        from fastres.parity.verify import verify as check

        reference = model if isinstance(model, torch.nn.Module) else source.graph
        data = shown if shown and io_dtype is None else examples(source)
        if not check(reference, engine, data).passed:  # once more, to say where
            quantised = engine.options.precision in EIGHT_BITS
            report = check(reference, engine, data, layerwise=quantised, bisect=not quantised)
            engine.close()
            report.raise_if_failed()
    return engine
