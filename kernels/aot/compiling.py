"""Compiles launches for any GPU without having one, as Triton's JIT would there."""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.kernels.aot.facts import KernelFacts, facts_of
from fastres.kernels.launch import Launch

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
}
# Triton 3.6 lists no attributes for constants other than texts; later versions list them for all
_EVERY_ATTRIBUTE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


def compile_kernel(launch: Launch, sm: int) -> CompiledKernel:
    """Compiles a launch for sm_`sm`, as Triton's JIT would on that GPU; needs no GPU."""
    target = GPUTarget("cuda", sm, 32)
    return triton.compile(source_of(launch), target=target, options=launch.options)


def compile_launch(launch: Launch, sm: int) -> KernelFacts:
    """Compiles a launch for sm_`sm` and reads the facts; needs no GPU.

    Raises:
        RuntimeError: a tool of Triton's wheel failed.
    """
    return facts_of(compile_kernel(launch, sm))


def key_of(launch: Launch) -> str:
    """Equal for launches that run the same machine code: what Triton specialises on."""
    source = source_of(launch)
    parts = (
        launch.kernel.__name__,
        sorted(source.signature.items()),
        sorted((str(name), repr(value)) for name, value in source.constants.items()),
        sorted(source.attrs.items()),
        sorted(launch.options.items()),
    )
    return repr(parts)


def source_of(launch: Launch) -> ASTSource:
    """The specialisation Triton's JIT makes for the launch: by dtype, by 1, by divisor 16.

    It is the JIT's own to the letter, so that what was compiled here is found in Triton's cache
    there, on the same machine.
    """
    signature: dict[str, str] = {}
    constants: dict[str, int | bool | str | None] = dict(launch.constants)
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name, launch.constants.get(name))
        one = isinstance(value, int) and value == 1
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif name in launch.constants or value is None or one:
            signature[name] = "constexpr"
            constants[name] = value
            if _EVERY_ATTRIBUTE or isinstance(value, str):
                attributes[(index,)] = []
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"  # a number with a fraction is never specialised
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            attributes[(index,)] = [] if value % 16 else [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)
