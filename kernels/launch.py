"""A kernel call as data: complete, checked, and not yet made.

Launchers build a `Launch` and run it; `fastres.kernels.aot` compiles the same object without a GPU,
so what is checked at compile time is what runs.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal, TypeAlias

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITCallable
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.kernels.cost import Cost, Target, least_seconds

_INTERPRETER = threading.Lock()  # Triton's interpreter runs one kernel at a time
_SIDES = ("BLOCK", "BOX", "CHUNK", "SPLIT")  # constants that a tile brings
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BYTE_DTYPES = (torch.int8, torch.float8_e4m3fn)  # what products of 8 bits are made of
Argument: TypeAlias = Any  # torch.Tensor | TensorDescriptor (untyped) | int | float | None


class LaunchError(RuntimeError):
    """A kernel does not compile for this GPU, asks for more of it than there is, or is refused."""


@dataclass(frozen=True)
class Launch:
    """One call of one jit kernel.

    Args:
        kernel: the `@triton.jit` function.
        programs: size of the one-dimensional grid.
        arguments: run-time arguments by name; None for an absent tensor, a TensorDescriptor for
            one that is read or written box by box through the copy engine (sm_90 and newer).
        constants: `tl.constexpr` arguments by name.
        num_warps: warps of 32 threads in a block.
        num_stages: depth of the software pipeline.
        fp_fusion: whether a product and a sum may become one fused multiply-add, which is rounded
            once. Not in 8-bit epilogues: their bits are those of `reference.finish_int8`.
        dependent: whether it may start before the kernel in front of it has ended (programmatic
            dependent launch, sm_90 and newer). Only for kernels that wait for that themselves.
        cost: its work and compulsory traffic, where the family can tell.
    """

    kernel: Any
    programs: int
    arguments: Mapping[str, Argument]
    constants: Mapping[str, int | bool | str | None]
    num_warps: int
    num_stages: int
    fp_fusion: bool = True
    dependent: bool = False
    cost: Cost | None = None

    def __post_init__(self) -> None:
        settle_key(self.kernel)

    @property
    def options(self) -> dict[str, int | bool]:
        """Triton's compile options, all named: its defaults differ between versions."""
        options: dict[str, int | bool] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fp_fusion,
        }
        if self.dependent:
            options["launch_pdl"] = True
        return options

    @property
    def tile(self) -> str:
        """Block sizes, warps and stages, in short."""
        blocks = [str(v) for name, v in self.constants.items() if name.startswith("BLOCK_")]
        return f"{'x'.join(blocks)} w{self.num_warps} s{self.num_stages}"

    def least(self, target: Target) -> tuple[float, Literal["arithmetic", "memory"]]:
        """The seconds that a target's rates allow at least, and which rate it is that limits.

        0 and "memory" of a family that cannot tell its cost.
        """
        if self.cost is None:
            return 0.0, "memory"
        itemsize = min(tensor.element_size() for tensor in self.tensors())
        tensor_cores = itemsize < 4 or self.constants.get("INPUT_PRECISION") == "tf32"
        seconds = least_seconds(self.cost, target, itemsize, tensor_cores)
        in_memory = self.cost.bytes / target.dram_bytes
        return seconds, "arithmetic" if seconds > in_memory else "memory"

    def overlapping(self) -> "Launch":
        """The same as a dependent launch: `fastres.kernels.jit.dependent`.

        In Triton's interpreter, which runs one kernel after the other, nothing changes.
        """
        if is_interpreted(self.kernel):
            return self
        return replace(self, dependent=True, constants={**self.constants, "DEPENDENT": True})

    def rounded(self) -> "Launch":
        """The same with its fp32 result rounded to TF32 (`reference.round_tf32`).

        For what a product in TF32 reads: the tensor cores cut off what they do not take.

        Raises:
            ValueError: the kernel has no results of fp32.
        """
        if "ROUND_TF32" not in self.constants:
            raise ValueError(f"{self.kernel.__name__} does not round to TF32")
        return replace(self, constants={**self.constants, "ROUND_TF32": True})

    def run(self) -> None:
        """Launches on the current stream of the first tensor's device.

        Raises:
            LaunchError: the kernel cannot be compiled, loaded or launched; another tile may do,
                unless an earlier launch broke the GPU's context, which synchronising tells.
            RuntimeError: tensors on the CPU while Triton's interpreter is off.
        """
        first = next(self.tensors())
        if first.device.type != "cuda" and not is_interpreted(self.kernel):
            raise RuntimeError(
                f"{self.kernel.__name__} got tensors on {first.device}: Triton kernels run on CUDA "
                "tensors; to run them on the CPU, for tests, set TRITON_INTERPRET=1 before "
                "fastres.kernels is imported"
            )
        alone = _INTERPRETER if is_interpreted(self.kernel) else nullcontext()
        with alone, torch.cuda.device_of(first):
            try:
                self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.options)
            # plain RuntimeErrors are a compiler pass that fails, a tensor map or a launch that the
            # driver refuses: Triton 3.6, ir.cc and backends/nvidia/driver.c
            except (CompilationError, OutOfResources, PTXASError, RuntimeError) as error:
                blocks = {k: v for k, v in self.constants.items() if k.startswith(_SIDES)}
                raise LaunchError(
                    f"{self.kernel.__name__} with {blocks}, {self.num_warps} warps and "
                    f"{self.num_stages} stages: {type(error).__name__}: {error}"
                ) from error

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors among the arguments, those behind descriptors included."""
        for argument in self.arguments.values():
            if isinstance(argument, torch.Tensor):
                yield argument
            elif isinstance(argument, TensorDescriptor):
                yield argument.base


def settle_key(kernel: Any) -> None:
    """Asks a kernel for its key in Triton's cache after all that it calls, innermost first.

    Triton 3.6 takes over what a called function reads of its module before it has looked there
    (runtime/jit.py, `_update_hash`): asked in another order, the same kernel has another key, and
    what another process has compiled is not found.

    Args:
        kernel: a jit function; nothing is done with what is none.
    """
    if not isinstance(kernel, JITCallable) or kernel.hash is not None:
        return
    names, known = kernel.fn.__code__.co_names, kernel.fn.__globals__
    modules = [known[name] for name in names if isinstance(known.get(name), ModuleType)]
    called = [known.get(name) for name in names]
    called += [getattr(module, name, None) for module in modules for name in names]
    for function in called:
        if function is not kernel:
            settle_key(function)
    _ = kernel.cache_key


def is_interpreted(kernel: Any) -> bool:
    """Whether the kernel was decorated under TRITON_INTERPRET=1 and so runs on the CPU."""
    return isinstance(kernel, InterpretedFunction)


def check_nhwc(name: str, x: torch.Tensor, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Refuses what no NHWC kernel reads: wrong rank, dtype, or strided channels.

    Args:
        dtypes: those accepted.

    Raises:
        ValueError: naming the tensor, what was found and what was expected.
    """
    if x.ndim != 4:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected [N, H, W, C]")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {x.dtype}, expected one of {tuple(dtypes)}")
    check_inner_stride(name, x)


def check_inner_stride(name: str, x: torch.Tensor) -> None:
    """Refuses a tensor whose last dimension is strided: kernels load along it."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {x.stride(-1)} in its last dimension, expected 1 "
            f"(shape {list(x.shape)}, strides {list(x.stride())})"
        )


def check_like(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int],
    x: torch.Tensor,
    dtypes: Sequence[torch.dtype],
    contiguous: bool = True,
) -> None:
    """Refuses an operand that does not go with `x`.

    Args:
        shape: the only shape accepted.
        x: the tensor whose device it must share.
        dtypes: those accepted.
        contiguous: whether every dimension must be packed.

    Raises:
        ValueError: naming the tensor, what was found and what was expected.
    """
    if list(tensor.shape) != list(shape):
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {expected}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {x.device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {list(tensor.stride())}, expected it contiguous")
