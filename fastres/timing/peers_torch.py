"""The ways to run a network that PyTorch brings, and Torch-TensorRT."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastres.errors import BackendUnavailable, UnsupportedError, missing
from fastres.graph.copies import copied
from fastres.options import DTYPE_OF
from fastres.timing.setting import Run, Setting


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


def eager(setting: Setting) -> Run:
    """PyTorch as it is."""
    dtype = DTYPE_OF[setting.precision]
    return _in_torch(copied(setting.model, dtype=dtype), dtype, setting.threads)


def eager_channels_last(setting: Setting) -> Run:
    """PyTorch as it is, in the memory layout that its convolutions like best."""
    dtype = DTYPE_OF[setting.precision]
    network: nn.Module = copied(setting.model, dtype=dtype)
    network = network.to(memory_format=torch.channels_last)
    return _in_torch(
        lambda x: network(x.contiguous(memory_format=torch.channels_last)), dtype, setting.threads
    )


def torch_compile(setting: Setting, mode: str = "default") -> Run:
    """torch.compile with frozen weights, in one of its modes.

    Raises:
        BackendUnavailable: it needs a C++ compiler and there is none.
        UnsupportedError: the mode does nothing of its own on this device.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise BackendUnavailable(
            f"torch_compile needs a C++ compiler and there is no {compiler}; install g++ (Debian: "
            "apt-get install g++) or set CXX"
        )
    if mode == "reduce-overhead" and setting.example.device.type != "cuda":
        raise UnsupportedError(
            "reduce-overhead means CUDA graphs; on the CPU it is what torch_compile is"
        )
    dtype = DTYPE_OF[setting.precision]
    network = copied(setting.model, dtype=dtype)
    chosen = torch._inductor.list_mode_options(mode)
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    # fullgraph: an error rather than a silent fall-back to eager; static: a program per shape
    compiled = torch.compile(
        network, fullgraph=True, dynamic=False, options={**chosen, "freezing": True}
    )
    return _in_torch(compiled, dtype, setting.threads)


def torch_tensorrt(setting: Setting) -> Run:
    """The network compiled by Torch-TensorRT for each shape; its weights' dtype types it.

    Raises:
        BackendUnavailable: the package is missing.
    """
    try:
        package = importlib.import_module("torch_tensorrt")
    except ImportError as error:
        raise BackendUnavailable(missing("torch-tensorrt", error)) from error
    dtype = DTYPE_OF[setting.precision]
    network = copied(setting.model, dtype=dtype)
    made: dict[torch.Size, Any] = {}

    def call(x: Tensor) -> Any:
        if x.shape not in made:
            made[x.shape] = package.compile(network, ir="dynamo", inputs=[x], min_block_size=1)
        return made[x.shape](x)

    return _in_torch(call, dtype, setting.threads)


def _cudnn() -> AbstractContextManager[None]:
    """cuDNN tries its algorithms, and multiplies float32 in full, not in TF32."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=True, deterministic=False, allow_tf32=False
    )
    return flags


def _in_torch(network: Callable[[Tensor], Any], dtype: torch.dtype, threads: int) -> Run:
    def run(x: Tensor) -> Tensor:
        with torch_threads(threads), torch.no_grad(), _cudnn() if x.is_cuda else nullcontext():
            y: Tensor = network(x.to(dtype))
            return y.float()

    return run
