"""Name → backend, the order that "auto" means, and the choice among several with its reasons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastres.backends.base import Backend, CompiledParts
from fastres.errors import BackendUnavailable, InputError, UnsupportedError
from fastres.graph.ir import Graph
from fastres.options import Options, Precision
from fastres.streams import current


def _reference() -> Backend:
    from fastres.backends.reference import ReferenceBackend

    return ReferenceBackend()


def _cpu() -> Backend:
    from fastres.backends.cpu import CpuBackend

    return CpuBackend()


def _triton() -> Backend:
    from fastres.backends.triton.backend import TritonBackend

    return TritonBackend()


def _tensorrt() -> Backend:
    from fastres.backends.tensorrt.backend import TensorRtBackend

    return TensorRtBackend()


def _onnxruntime() -> Backend:
    from fastres.backends.onnx_runtime import OnnxRuntimeBackend

    return OnnxRuntimeBackend()


BACKENDS: dict[str, Callable[[], Backend]] = {
    "cpu": _cpu,
    "triton": _triton,
    "tensorrt": _tensorrt,
    "reference": _reference,
    "onnxruntime": _onnxruntime,
}


@dataclass(frozen=True)
class Choice:
    """The backend taken, and why those before it in the list were not."""

    backend: Backend
    passed_over: tuple[str, ...]


def check_names(names: Sequence[str]) -> None:
    """Refuses names of no backend, before any work is done.

    Raises:
        InputError: naming it, and what there is.
    """
    for name in names:
        if name not in ("auto", *BACKENDS):
            raise InputError(f"backend is {name!r}; there are auto, {', '.join(BACKENDS)}")


def order(
    names: Sequence[str], device: torch.device | None, target: str | None = None
) -> tuple[str, ...]:
    """Replaces "auto": triton where there is a GPU to use or to build for, else cpu."""
    on_gpu = device.type == "cuda" if device is not None else torch.cuda.is_available()
    on_gpu = on_gpu or target is not None
    return tuple(("triton" if on_gpu else "cpu") if name == "auto" else name for name in names)


def choose(
    graph: Graph, options: Options, precision: Precision, compiled: CompiledParts | None = None
) -> Choice:
    """The first backend of the list that runs here, in this precision, and takes every node.

    With `on_unsupported="fallback"` it need not take every node.

    Args:
        compiled: what a saved engine brings along.

    Raises:
        BackendUnavailable: none of them can run on this machine.
        UnsupportedError: they refuse the precision or nodes; every reason is listed.
    """
    check_names(options.backend)
    task = "run here" if options.target is None else f"build for {options.target}"
    reasons: list[str] = []
    runnable, advice = False, "Choose another backend, precision or device"
    for name in order(options.backend, options.device, options.target):
        candidate = BACKENDS[name]()
        why = _unavailable(candidate, options, compiled)
        if why is not None:
            reasons.append(f"{name} cannot {task}: {why}")
            continue
        runnable = True
        wrong = candidate.precision(precision)
        if wrong is not None:
            reasons.append(f"{name} refuses the precision: {wrong}")
            continue
        misplaced = _misplaced(candidate, options)
        if misplaced is not None:
            reasons.append(misplaced)
            continue
        refused = candidate.refusals(graph)
        if refused and options.on_unsupported == "error":
            listed = "\n".join(f"  {refusal}" for refusal in refused)
            reasons.append(f"{name} refuses {len(refused)} of {len(graph.nodes)} nodes:\n{listed}")
            if options.target is None:
                advice = (
                    "Choose another backend, or pass on_unsupported='fallback' (--on-unsupported "
                    "fallback) to run refused nodes in PyTorch"
                )
            continue
        return Choice(candidate, tuple(reasons))
    text = "\n".join(reasons)
    if not runnable:
        raise BackendUnavailable(f"no backend of {list(options.backend)} can {task}\n{text}")
    raise UnsupportedError(f"{text}\n{advice}")


def _unavailable(
    candidate: Backend, options: Options, compiled: CompiledParts | None
) -> str | None:
    """What the backend says of the GPU that was asked for, whichever is the current one."""
    device = options.device
    named = device is not None and device.type == "cuda" and device.index is not None
    if device is None or not named or options.target is not None or not torch.cuda.is_available():
        return candidate.unavailable(options.target, compiled)
    if device.index >= (count := torch.cuda.device_count()):
        return f"device is {str(device)!r}, and PyTorch sees {count} GPU{'s'[: count > 1]}"
    with current(device):
        return candidate.unavailable(None, compiled)


def _misplaced(candidate: Backend, options: Options) -> str | None:
    wants = candidate.device(options)
    if options.device is None or wants.type == options.device.type:
        return None
    return f"{candidate.name} runs on {wants.type}, device={str(options.device)!r} was asked for"
