"""Makes binaries of launches, and the arguments of launches for binaries; needs triton.

Source: the order of parameters is that of Triton's own launchers: 3.6 backends/nvidia/driver.py
`make_launcher`; 3.9 backends/driver.py `expand_signature` and backends/nvidia/driver.c
`launchKernel`.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from triton.compiler import ASTSource, CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.kernels.aot.compiling import compile_kernel, source_of
from fastres.kernels.aot.facts import KernelFacts, facts_of
from fastres.kernels.compiled.binary import (
    DESCRIPTOR,
    Constant,
    KernelBinary,
    KernelHeader,
    Parameter,
    Scratch,
    Value,
    pack,
)
from fastres.kernels.compiled.tensor_map import BoxLayout, TensorMap, TensorView
from fastres.kernels.launch import Argument, Launch

# Triton's metadata numbers these element types as PTX does, the driver as CUtensorMapDataType
_HOST_ELEMENT_TYPES = {8: 10, 9: 8, 10: 9}  # fp32 flushed, fp64, bf16


class Built(NamedTuple):
    """One compilation of a launch: what its kernel uses, and the kernel itself."""

    facts: KernelFacts
    binary: KernelBinary


def build_launch(launch: Launch, sm: int) -> Built:
    """Compiles a launch once for sm_`sm`, for its facts and its machine code; needs no GPU.

    Raises:
        RuntimeError: a tool of Triton's wheel failed.
        ValueError: as `binary_of`.
    """
    kernel = compile_kernel(launch, sm)
    return Built(facts_of(kernel), binary_of(launch, sm, kernel))


def binary_of(launch: Launch, sm: int, kernel: CompiledKernel | None = None) -> KernelBinary:
    """The machine code of a launch for sm_`sm`; needs no GPU.

    Args:
        kernel: what `compile_kernel` made of the launch; compiled here when None.

    Raises:
        ValueError: descriptors or a dependent launch below sm_90, which has neither.
    """
    source = source_of(launch)
    descriptors = [name for name, kind in source.signature.items() if kind.startswith(DESCRIPTOR)]
    if sm < 90 and (descriptors or launch.dependent):
        raise ValueError(
            f"{launch.kernel.__name__} has descriptors {descriptors} and dependent launch "
            f"{launch.dependent}, which need sm_90 or newer; the target is sm_{sm}"
        )
    kernel = kernel or compile_kernel(launch, sm)
    facts, cubin = kernel.metadata, kernel.asm["cubin"]
    boxes = dict(zip(descriptors, map(_box_layout, facts.tensordesc_meta or ()), strict=True))
    header = KernelHeader(
        kernel=facts.name,
        sm=sm,
        num_warps=facts.num_warps,
        num_ctas=facts.num_ctas,
        shared_bytes=facts.shared,
        global_scratch=Scratch(facts.global_scratch_size, facts.global_scratch_align),
        profile_scratch=Scratch(facts.profile_scratch_size, facts.profile_scratch_align),
        dependent=facts.launch_pdl,
        cooperative=facts.launch_cooperative_grid,
        parameters=tuple(_parameters(source, boxes)),
        boxes=boxes,
        constants=_constants(source),
        triton=facts.triton_version,
        sha256=hashlib.sha256(cubin).hexdigest(),
    )
    return KernelBinary(header, cubin)


def arguments_of(
    launch: Launch, binary: KernelBinary, *, encode: Callable[[TensorMap], bytes]
) -> list[bytes]:
    """The bytes of every parameter, in the order in which Triton's launcher passes them.

    Args:
        launch: the call; one that the binary's kernel was compiled for, on other tensors maybe.
        binary: the kernel.
        encode: makes a tensor map's 128 bytes: `driver.encode_tensor_map`.

    Raises:
        ValueError: the launch needs another specialisation of the kernel.
    """
    check_specialised(launch, binary.header)
    return pack(binary.header, values_of(launch), encode=encode)


def check_specialised(launch: Launch, header: KernelHeader) -> None:
    """Refuses a launch that Triton would compile to other machine code.

    Raises:
        ValueError: saying what differs.
    """
    source = source_of(launch)
    signature = {name: kind for name, kind in source.signature.items() if kind != "constexpr"}
    for what, found, expected in (
        ("arguments", signature, header.signature),
        ("constants", _constants(source), header.constants),
        ("dependent launch", launch.dependent, header.dependent),
    ):
        if found != expected:
            raise ValueError(
                f"{header.kernel} was compiled for {what} {expected}, this launch has {found}"
            )


def values_of(launch: Launch) -> dict[str, Value]:
    """The run-time arguments without torch and triton: addresses, numbers, tensor views."""
    return {name: _value(argument) for name, argument in launch.arguments.items()}


def _value(argument: Argument) -> Value:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    if isinstance(argument, TensorDescriptor):
        return TensorView(
            address=argument.base.data_ptr(),
            shape=tuple(argument.shape),
            strides=tuple(argument.strides),
            fill_nan=argument.padding == "nan",
            tf32=getattr(argument, "round_f32_to_tf32", False),  # not in Triton 3.6
        )
    return argument


def _parameters(source: ASTSource, boxes: Mapping[str, BoxLayout]) -> Iterator[Parameter]:
    """Arguments in order, those compiled in left out, descriptors in three parts; scratch."""
    for index, (name, kind) in enumerate(source.signature.items()):
        if kind == "constexpr":
            continue
        divisible = ["tt.divisibility", 16] in source.attrs.get((index,), [])
        yield Parameter(name, kind, divisor=16 if divisible else 1)
        if name in boxes:
            dims = range(len(boxes[name].box))
            yield from (Parameter(name, "i32", "shape", dim) for dim in dims)
            yield from (Parameter(name, "i64", "stride", dim) for dim in dims)
    yield Parameter("", "*i8", "global scratch")
    yield Parameter("", "*i8", "profile scratch")


def _constants(source: ASTSource) -> dict[str, Constant]:
    names = list(source.signature)
    return {names[path[0]]: value for path, value in source.constants.items()}


def _box_layout(meta: Mapping[str, Any]) -> BoxLayout:
    if meta["fp4_padded"] or meta.get("is_im2col"):
        raise ValueError(f"a descriptor of packed fp4 or im2col: expected a tiled one, got {meta}")
    return BoxLayout(
        element_type=_HOST_ELEMENT_TYPES.get(meta["elem_type"], meta["elem_type"]),
        element_size=meta["elem_size"],
        swizzle=meta["swizzle"],
        box=tuple(meta["block_size"]),
    )
