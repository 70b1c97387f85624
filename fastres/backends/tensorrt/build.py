"""ONNX → a serialized TensorRT engine, with progress, and with what the builder said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastres.backends.tensorrt.api import Api
from fastres.backends.tensorrt.layers import from_log
from fastres.backends.tensorrt.plan import Built, Range
from fastres.errors import BackendUnavailable, OutOfMemory, UnsupportedError
from fastres.graph.onnx import origin_of
from fastres.text import progress_bar

WORKSPACE = 4 << 30  # bytes that a kernel may use besides its tensors


def build(
    api: Api,
    onnx: bytes,
    ranges: Mapping[str, Range],
    *,
    tf32: bool = False,
    workspace: int = WORKSPACE,
    target: str | None = None,
    timing_cache: bytes | None = None,
) -> Built:
    """Builds an engine.

    Args:
        onnx: as `fastres.graph.onnx` writes it; its types are kept to.
        ranges: by the inputs' names.
        tf32: whether float32 products may be rounded to TF32 first.
        workspace: bytes at most.
        target: an architecture that need not be here; see `find_api`.
        timing_cache: what an earlier build gave.

    Raises:
        BackendUnavailable: TensorRT gives no builder here.
        UnsupportedError: it cannot parse or build the network; in its words, with our nodes.
        OutOfMemory: it has no room to build an engine for batches that large.
        KeyboardInterrupt: the build was interrupted.
    """
    trt = api.module
    log = _logger(trt)
    builder = trt.Builder(log)
    if not builder:
        raise BackendUnavailable(f"{api} gives no builder here: {log.last_error}")
    network = builder.create_network(api.network_flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(onnx):
        found = (_parser_error(parser.get_error(i)) for i in range(parser.num_errors))
        reasons = "\n".join(found) or log.last_error
        raise UnsupportedError(f"{api} cannot read the network:\n{reasons}")
    config = _config(api, builder, ranges, tf32, workspace, target)
    if not api.is_rtx:
        _set_timing_cache(config, timing_cache or b"")
    with progress_bar(f"{api} builds" + (f" for {target}" if target else "")) as moved:
        monitor = _monitor(trt, moved)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None and "OutOfMemory" in log.last_error:
        largest = ", ".join(f"{name} {list(r.largest)}" for name, r in ranges.items())
        raise OutOfMemory(
            f"{api} has no room to build for inputs of up to {largest}: compile for smaller "
            "batches, or give a smaller max_batch_size"
        )
    if plan is None:
        raise UnsupportedError(f"{api} cannot build the network: {log.last_error}")
    kept = None if api.is_rtx else config.get_timing_cache()
    return Built(bytes(plan), from_log(log.table), bytes(kept.serialize()) if kept else b"")


def _config(
    api: Api,
    builder: Any,
    ranges: Mapping[str, Range],
    tf32: bool,
    workspace: int,
    target: str | None,
) -> Any:
    trt = api.module
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not tf32:  # which is allowed unless it is forbidden
        config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    for name, shapes in ranges.items():
        profile.set_shape(name, shapes.smallest, shapes.usual, shapes.largest)
    config.add_optimization_profile(profile)
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(api.architecture(target), 0)
    return config


def _set_timing_cache(config: Any, data: bytes) -> None:
    """Starts with what an earlier build gave; with nothing, where that is damaged or another's."""
    for start in (data, b""):
        cache = config.create_timing_cache(start)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return


def _logger(trt: Any) -> Any:
    """Keeps the table of layers, and the last error; prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.table = ""
            self.last_error = "it does not say why"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last_error = message.strip().splitlines()[0]
            elif ", LayerType: " in message:
                self.table += message + "\n"

    return Log()


def _monitor(trt: Any, moved: Callable[[int, int], None]) -> Any:
    """Moves a bar with the steps of the outermost phase, and stops the build on an interrupt."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                if phase in self._steps:
                    moved(step + 1, self._steps[phase])
            except KeyboardInterrupt:  # it comes while Python runs: here
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()


def _parser_error(error: Any) -> str:
    node = origin_of(error.node_name()) if hasattr(error, "node_name") else ""
    return f"  {node or 'the network'}: {str(error.desc()).strip()}"
