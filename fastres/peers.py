"""The other ways to run a network, each set up as its expert user would, to be timed beside ours.

Every peer gets the same number of threads, the same float32 input and the same precision, and
prepares itself for each input shape when it first meets it.
"""

from __future__ import annotations

import copy
import importlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastres.backends.cpu import CpuBackend
from fastres.backends.openvino_runtime import core, cpu_config, openvino
from fastres.backends.reference import ReferenceExecutable
from fastres.benchmarking import Target
from fastres.errors import (
    BackendUnavailable,
    FastresError,
    InputError,
    ParityError,
    UnsupportedError,
    missing,
)
from fastres.graph import onnx as onnx_form
from fastres.graph.capture import capture
from fastres.graph.ir import Graph
from fastres.options import DTYPE_OF, Input, Options, Precision
from fastres.tolerances import Errors, allowed, errors

Run = Callable[[Tensor], Tensor]


def make_peer(
    name: str,
    model: nn.Module,
    example: Tensor,
    *,
    precision: Precision = "fp32",
    threads: int | None = None,
) -> Target:
    """Prepares one peer for a network with one input and one output tensor.

    Peers: `eager` and `eager_channels_last` (PyTorch as it is), `torch_compile` (inductor with
    frozen weights), `openvino` (used directly, one stream), `onnxruntime` (from this package's
    ONNX of the unoptimised network, all of its own optimisations on).

    Args:
        model: in eval(); it is copied where the peer would change it.
        example: [N, C, H, W] float32; the peer is prepared for its shape.
        precision: in which the network runs. Input and output stay float32: the peer converts.
        threads: for every peer alike; None takes every core this process may use.

    Returns:
        A `Target`. OpenVINO's result is a view, valid until the next call.

    Raises:
        InputError: no such peer, training mode, or another kind of input or output.
        BackendUnavailable: a package or a compiler is missing; says how to get it.
        UnsupportedError: the peer has no such precision here, or does not run on that device.
    """
    if name not in PEERS:
        raise InputError(f"there is no peer {name!r}; there are {', '.join(PEERS)}")
    peer = PEERS[name]
    if example.is_cuda:
        model = copy.deepcopy(model).to(example.device)
    _check_network(model, example)
    if precision not in peer.precisions:
        raise UnsupportedError(
            f"{name} runs {', '.join(peer.precisions)} here, not {precision}: choose another "
            "precision or leave this peer out"
        )
    if peer.cpu_only and example.device.type != "cpu":
        raise UnsupportedError(f"{name} is compared on the CPU only; the input is {example.device}")
    run = peer.prepare(model, precision, Options(threads=threads).num_threads)
    run(example)
    return Target(name, run, precision)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Sets torch's thread count and restores it; costs nothing where it is so already."""
    before = torch.get_num_threads()
    if before != threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if before != threads:
            torch.set_num_threads(before)


@dataclass(frozen=True)
class Reference:
    """What a result is held against: the float64 result and PyTorch's own error beside it."""

    oracle: Tensor
    baseline: Errors


def reference(
    model: nn.Module, example: Tensor, precision: Precision, quantised: Graph | None = None
) -> Reference:
    """Runs the network in float64, and in PyTorch in the precision itself.

    Args:
        quantised: for int8: the graph that is the network in int8.
    """
    x, dtype = example.cpu(), DTYPE_OF[precision]
    with torch.no_grad():
        oracle = copy.deepcopy(model).cpu().double()(x.double())
        if quantised is not None:
            result = ReferenceExecutable(quantised, dtype).run([x])[0]
        else:
            result = copy.deepcopy(model).cpu().to(dtype)(x.to(dtype))
    return Reference(oracle, errors(result, oracle))


def check_target(
    target: Target,
    reference_output: Tensor,
    example: Tensor,
    precision: Precision,
    *,
    baseline: Errors | None = None,
) -> Errors:
    """Holds a target's result to the tolerance policy; call it before timing.

    Args:
        reference_output: of the network for `example`, best in float64; see `reference`.
        baseline: PyTorch's own error in that precision; None leaves the policy's floor alone.

    Returns:
        The error, relative to the reference's RMS.

    Raises:
        ParityError: it is beyond the policy. A speed of that target would mean nothing.
    """
    result = target.call(example)
    if not isinstance(result, Tensor):
        raise ParityError(f"{target.name} returns {type(result).__name__}, expected a tensor")
    dtype, own = DTYPE_OF[precision], baseline or Errors(0.0, 0.0)
    found, bound = errors(result, reference_output), allowed(own, dtype)
    if not found.within(own, dtype):
        raise ParityError(
            f"{target.name} in {precision} at batch size {len(example)}: "
            + (found.reason or f"largest error {found.largest:.2e}, RMS {found.rms:.2e}")
            + f"; allowed are {bound.largest:.2e} and {bound.rms:.2e} of the result's RMS"
        )
    return found


def contenders(
    names: Sequence[str],
    model: nn.Module,
    examples: Mapping[int, Tensor],
    *,
    ours: Sequence[Target] = (),
    precision: Precision = "fp32",
    threads: int | None = None,
    quantised: Graph | None = None,
) -> tuple[list[Target], dict[str, str]]:
    """Ours and the named peers, checked at every batch size, and why others may not be timed."""
    found, refused = list(ours), dict[str, str]()
    first = next(iter(examples.values()))
    for name in names:
        try:
            found.append(make_peer(name, model, first, precision=precision, threads=threads))
        except FastresError as error:
            refused[name] = str(error)
    for example in examples.values():
        expected = reference(model, example, precision, quantised)
        for target in tuple(found):
            try:
                check_target(
                    target, expected.oracle, example, precision, baseline=expected.baseline
                )
            except ParityError as error:
                refused[target.name] = str(error)
                found.remove(target)
    return found, refused


def _check_network(model: nn.Module, example: Tensor) -> None:
    if any(module.training for module in model.modules()):
        raise InputError("the model is in training mode; call model.eval() first")
    if example.dtype != torch.float32:
        raise InputError(f"example is {example.dtype}; peers are fed torch.float32")
    with torch.no_grad():
        output = model(example)
    if not isinstance(output, Tensor):
        raise InputError(f"the model returns {type(output).__name__}; peers need one tensor")


def _eager(model: nn.Module, precision: Precision, threads: int) -> Run:
    dtype = DTYPE_OF[precision]
    network = copy.deepcopy(model).to(dtype)
    return _in_torch(network, dtype, threads)


def _eager_channels_last(model: nn.Module, precision: Precision, threads: int) -> Run:
    dtype = DTYPE_OF[precision]
    network: nn.Module = copy.deepcopy(model).to(dtype).to(memory_format=torch.channels_last)
    return _in_torch(
        lambda x: network(x.contiguous(memory_format=torch.channels_last)), dtype, threads
    )


def _torch_compile(model: nn.Module, precision: Precision, threads: int) -> Run:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise BackendUnavailable(
            f"torch_compile needs a C++ compiler and there is no {compiler}; install g++ (Debian: "
            "apt-get install g++) or set CXX"
        )
    dtype = DTYPE_OF[precision]
    network = copy.deepcopy(model).to(dtype)
    # fullgraph: an error rather than a silent fall-back to eager; static: a program per shape
    compiled = torch.compile(network, fullgraph=True, dynamic=False, options={"freezing": True})
    return _in_torch(compiled, dtype, threads)


def _in_torch(network: Callable[[Tensor], Any], dtype: torch.dtype, threads: int) -> Run:
    def run(x: Tensor) -> Tensor:
        with torch_threads(threads), torch.no_grad():
            y: Tensor = network(x.to(dtype))
            return y.float()

    return run


def _openvino(model: nn.Module, precision: Precision, threads: int) -> Run:
    ov = _import("openvino")
    if (why := CpuBackend().precision(precision)) is not None:
        raise UnsupportedError(f"openvino: {why}")
    config = cpu_config(precision, "latency", threads)

    def specialise(x: Tensor) -> Run:
        with warnings.catch_warnings(), torch.no_grad():
            # OpenVINO 2026.4 still traces; torch 2.15 calls that deprecated
            warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
            converted = ov.convert_model(model, example_input=x, input=[tuple(x.shape)])
        request = core().compile_model(converted, "CPU", config).create_infer_request()

        def run(x: Tensor) -> Tensor:
            array = x.detach().contiguous().numpy()
            request.set_input_tensor(0, ov.Tensor(array, shared_memory=True))
            request.infer()
            return torch.from_numpy(request.get_output_tensor(0).data)

        return run

    return _by_shape(specialise)


def _onnxruntime(model: nn.Module, precision: Precision, threads: int) -> Run:
    ort = _import("onnxruntime")

    def specialise(x: Tensor) -> Run:
        graph = capture(model, (Input(tuple(x.shape)),)).graph
        refused = [
            f"{node.name}: {why}" for node in graph.nodes if (why := onnx_form.refusal(node))
        ]
        if refused:
            raise UnsupportedError(f"onnxruntime: there is no ONNX form of {'; '.join(refused)}")
        settings = ort.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.add_free_dimension_override_by_name("N", len(x))
        session = ort.InferenceSession(
            onnx_form.to_onnx(graph).SerializeToString(),
            settings,
            providers=["CPUExecutionProvider"],
        )
        name = session.get_inputs()[0].name

        def run(x: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {name: x.detach().contiguous().numpy()})[0])

        return run

    return _by_shape(specialise)


def _by_shape(specialise: Callable[[Tensor], Run]) -> Run:
    """A runner for every input shape, made when the shape is first seen."""
    runs: dict[torch.Size, Run] = {}

    def run(x: Tensor) -> Tensor:
        if x.shape not in runs:
            runs[x.shape] = specialise(x)
        return runs[x.shape](x)

    return run


def _import(package: str) -> Any:
    try:
        return openvino() if package == "openvino" else importlib.import_module(package)
    except ImportError as error:
        raise BackendUnavailable(missing(package, error)) from error


@dataclass(frozen=True)
class _Peer:
    prepare: Callable[[nn.Module, Precision, int], Run]
    precisions: tuple[Precision, ...]
    cpu_only: bool = False


_TORCH: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
PEERS: dict[str, _Peer] = {
    "eager": _Peer(_eager, _TORCH),
    "eager_channels_last": _Peer(_eager_channels_last, _TORCH),
    "torch_compile": _Peer(_torch_compile, _TORCH),
    "openvino": _Peer(_openvino, ("fp32", "bf16"), cpu_only=True),
    # ONNX Runtime's CPU provider has no bf16 convolution
    "onnxruntime": _Peer(_onnxruntime, ("fp32",), cpu_only=True),
}
