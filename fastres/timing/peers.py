"""The other ways to run a network, each set up as its expert user would, to be timed beside ours.

Every peer gets the same number of threads, the same float32 input and the same precision, and
prepares itself for each input shape when it first meets it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fastres.errors import InputError, UnsupportedError
from fastres.graph.copies import copied
from fastres.graph.hooks import check_hooks
from fastres.options import Options, Precision
from fastres.timing import peers_exported, peers_torch
from fastres.timing.benchmark import Target
from fastres.timing.setting import Run, Setting


def make_peer(
    name: str,
    model: nn.Module,
    example: Tensor,
    *,
    precision: Precision = "fp32",
    threads: int | None = None,
    images: Tensor | None = None,
) -> Target:
    """Prepares one peer for a network with one input and one output tensor.

    `PEERS` lists them. `torch_compile` has frozen weights; `openvino` is used directly, one stream;
    `nncf` is OpenVINO with a network that NNCF has quantised; `onnxruntime` is given this package's
    ONNX of the unoptimised network; `tensorrt` is given what our own backend of that name gives it.

    Args:
        model: in eval(); it is copied, never changed.
        example: [N, C, H, W] float32; the peer is prepared for its shape.
        precision: in which the network runs. Input and output stay float32: the peer converts.
        threads: for every peer alike; None takes every core this process may use.
        images: [N, C, H, W] float32, to calibrate with; int8 needs them.

    Returns:
        A `Target`. OpenVINO's result is a view, valid until the next call.

    Raises:
        InputError: no such peer, training mode, or another kind of input or output.
        CaptureError: the model has a forward hook that is no part of it.
        BackendUnavailable: a package or a compiler is missing; says how to get it.
        UnsupportedError: the peer has no such precision here, or does not run on that device.
    """
    if name not in PEERS:
        raise InputError(f"there is no peer {name!r}; there are {', '.join(PEERS)}")
    check_hooks(model)
    model = copied(model, device=example.device)
    _check_network(model, example)
    if (why := refusal(name, precision, example.device)) is not None:
        raise UnsupportedError(why)
    count = Options(threads=threads).num_threads
    run = PEERS[name].prepare(Setting(model, precision, count, example, images))
    run(example)
    return Target(name, run, precision)


def refusal(name: str, precision: Precision, device: torch.device) -> str | None:
    """Why a peer is not timed in that precision there; None where it is."""
    peer = PEERS[name]
    if precision not in peer.precisions:
        return (
            f"{name} runs {', '.join(peer.precisions)} here, not {precision}: choose another "
            "precision or leave this peer out"
        )
    if peer.only_on not in (None, device.type):
        return f"{name} is compared on {peer.only_on} only; this is {device.type}"
    return None


def tunes_itself(name: str) -> bool:
    """Whether a peer times kernels while it is made, and so wants the machine to itself."""
    return PEERS[name].tunes


def _check_network(model: nn.Module, example: Tensor) -> None:
    if any(module.training for module in model.modules()):
        raise InputError("the model is in training mode; call model.eval() first")
    if example.dtype != torch.float32:
        raise InputError(f"example is {example.dtype}; peers are fed torch.float32")
    with torch.no_grad():
        output = model(example)
    if not isinstance(output, Tensor):
        raise InputError(f"the model returns {type(output).__name__}; peers need one tensor")


@dataclass(frozen=True)
class _Peer:
    prepare: Callable[[Setting], Run]
    precisions: tuple[Precision, ...]
    only_on: Literal["cpu", "cuda"] | None = None
    tunes: bool = False  # it times kernels while it is made


_TORCH: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
_COMPILED = peers_torch.torch_compile
PEERS: dict[str, _Peer] = {
    "eager": _Peer(peers_torch.eager, _TORCH),
    "eager_channels_last": _Peer(peers_torch.eager_channels_last, _TORCH),
    "torch_compile": _Peer(_COMPILED, _TORCH),
    "torch_compile_reduce_overhead": _Peer(partial(_COMPILED, mode="reduce-overhead"), _TORCH),
    "torch_compile_max_autotune": _Peer(
        partial(_COMPILED, mode="max-autotune"), _TORCH, tunes=True
    ),
    "openvino": _Peer(peers_exported.openvino_direct, ("fp32", "bf16"), "cpu"),
    "nncf": _Peer(peers_exported.nncf, ("int8",), "cpu"),
    # ONNX Runtime's CPU provider has no bf16 convolution
    "onnxruntime": _Peer(peers_exported.onnxruntime, ("fp32", "int8"), "cpu"),
    "torch_tensorrt": _Peer(peers_torch.torch_tensorrt, ("fp32", "fp16"), "cuda", tunes=True),
    "tensorrt": _Peer(
        peers_exported.tensorrt, ("fp32", "tf32", "fp16", "int8"), "cuda", tunes=True
    ),
}
_USUAL = {
    "cpu": ("eager", "torch_compile", "openvino", "onnxruntime"),
    "cuda": ("eager_channels_last", "torch_compile_reduce_overhead", "torch_compile_max_autotune"),
}


def usual_peers(device: torch.device) -> tuple[str, ...]:
    """Those that a user would compare with first."""
    return _USUAL[device.type]
