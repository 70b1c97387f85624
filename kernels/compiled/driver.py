"""Launches compiled kernels through the CUDA driver; needs no compiler, torch or triton.

Needs the package cuda-bindings and an NVIDIA driver; importing this module needs neither.

Source: Triton 3.9, backends/nvidia/driver.c: `loadBinary`, `fillTMADescriptorTiled`, `_launch`.
"""

import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeAlias

from fastres.kernels.compiled.binary import KernelBinary, KernelHeader
from fastres.kernels.compiled.tensor_map import TENSOR_MAP_BYTES, TensorMap

Function: TypeAlias = Any  # cuda.bindings.driver.CUfunction
_DEFAULT_SHARED_BYTES = 48 * 1024  # what a block gets without asking
_PORTABLE_CLUSTER = 8  # blocks in a cluster that every GPU with clusters accepts
_SMALL_TENSOR_BYTES = 128 * 1024
_LAST_DRIVER_TO_PATCH = 13010  # CUDA 13.1


class DriverUnavailable(RuntimeError):
    """The CUDA driver cannot be used here: a package, the driver or a GPU is missing."""


def cuda_driver() -> Any:
    """The module cuda.bindings.driver, with the driver initialised.

    Raises:
        DriverUnavailable: saying what is missing.
    """
    try:
        from cuda.bindings import driver  # type: ignore[import-untyped]
    except ImportError as error:
        raise DriverUnavailable(
            f"cuda.bindings cannot be imported ({error}); pip install 'cuda-bindings>=13.0.3,<14'"
        ) from error
    try:
        (code,) = driver.cuInit(0)
    except RuntimeError as error:  # cuda-bindings looks for the library at the first call
        raise DriverUnavailable(
            f"the CUDA driver's library was not found ({error}); compiled kernels need an NVIDIA "
            "GPU and its driver"
        ) from error
    if code != driver.CUresult.CUDA_SUCCESS:
        raise DriverUnavailable(f"the CUDA driver does not start ({code.name}): is there a GPU?")
    return driver


def use_device(device: int) -> None:
    """Makes a GPU's primary context, which torch uses too, the calling thread's current one.

    Raises:
        DriverUnavailable: no driver, or no such GPU.
    """
    driver = cuda_driver()
    count = checked(driver.cuDeviceGetCount())
    if not 0 <= device < count:
        raise DriverUnavailable(f"device is {device}, expected one of this machine's {count} GPUs")
    checked(driver.cuCtxSetCurrent(_primary_context(device)))


@cache
def _primary_context(device: int) -> Any:
    """Retained once and for good: the modules stay loaded in it as long as the process lives."""
    driver = cuda_driver()
    return checked(driver.cuDevicePrimaryCtxRetain(checked(driver.cuDeviceGet(device))))


class DriverModule:
    """A binary, loaded once on each GPU that runs it; any thread may use it.

    The modules stay loaded as long as the process lives: CUDA graphs may still hold them.

    Args:
        binary: the compiled kernel.
    """

    def __init__(self, binary: KernelBinary) -> None:
        self.binary = binary
        self._functions: dict[int, Function] = {}
        self._lock = threading.Lock()

    def function(self, device: int = 0) -> Function:
        """The kernel on one GPU, loaded at the first call; makes the GPU the thread's current.

        Raises:
            DriverUnavailable: no driver, or no such GPU.
            ValueError: the GPU cannot run this machine code.
        """
        use_device(device)
        with self._lock:
            if device not in self._functions:
                self._functions[device] = _load(self.binary, device)
            return self._functions[device]


def runs_on(sm: int, device_sm: int) -> bool:
    """Whether machine code for sm_`sm` runs on a GPU of compute capability `device_sm` / 10.

    Triton compiles for sm_90a, sm_100a and so on, which run on that very GPU; below sm_90 for
    the generation, where a newer minor version runs an older one's code.
    """
    if sm >= 90:
        return sm == device_sm
    return sm // 10 == device_sm // 10 and sm <= device_sm


def encode_tensor_map(tensor: TensorMap) -> bytes:
    """The 128 bytes that the copy engine reads, as the driver encodes them.

    Raises:
        DriverUnavailable: no driver.
        RuntimeError: the driver refuses the map.
    """
    driver = cuda_driver()
    fill = driver.CUtensorMapFloatOOBfill
    rank = len(tensor.sizes)
    # driver.c of Triton 3.9, lines 634 to 644; 3.6, lines 414 to 425
    encoded = checked(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType(tensor.element_type),
            rank,
            tensor.address,
            [driver.cuuint64_t(size) for size in tensor.sizes],
            [driver.cuuint64_t(stride) for stride in tensor.strides],
            [driver.cuuint32_t(size) for size in tensor.box],
            [driver.cuuint32_t(1)] * rank,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle(tensor.swizzle),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            fill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA
            if tensor.fill_nan
            else fill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        f"cuTensorMapEncodeTiled of {tensor}",
    )
    version = checked(driver.cuDriverGetVersion())
    return patched(ctypes.string_at(encoded.getPtr(), TENSOR_MAP_BYTES), tensor.span, version)


def patched(encoded: bytes, span: int, driver_version: int) -> bytes:
    """Clears bit 21 of the second word where drivers up to CUDA 13.1 wrongly set it.

    Source: Triton 3.9's driver.c, lines 689 to 705, which follows CUTLASS b7ecaa605dd7.

    Args:
        encoded: tensor map.
        span: bytes from the tensor's first element to the start of the last.
        driver_version: 1000 · major + 10 · minor.
    """
    if driver_version > _LAST_DRIVER_TO_PATCH or span + 1 >= _SMALL_TENSOR_BYTES:
        return encoded
    word = int.from_bytes(encoded[8:16], "little") & ~(1 << 21)
    return encoded[:8] + word.to_bytes(8, "little") + encoded[16:]


def launch(
    header: KernelHeader,
    function: Function,
    arguments: Sequence[bytes],
    programs: int,
    stream: int = 0,
) -> None:
    """Launches a kernel on a one-dimensional grid; may be recorded into a CUDA graph.

    Args:
        header: of the kernel.
        function: what `DriverModule.function` gave.
        arguments: what `binary.pack` gave.
        programs: clusters of the grid, or blocks where a cluster is one; nothing happens if 0.
        stream: the address of a CUstream; 0 for the device's default stream.

    Raises:
        ValueError: arguments of other sizes than the kernel's.
        RuntimeError: the driver refuses the launch.
    """
    sizes = [parameter.size for parameter in header.parameters]
    if [len(argument) for argument in arguments] != sizes:
        raise ValueError(
            f"{header.kernel} was given arguments of {[len(a) for a in arguments]} bytes, "
            f"expected {sizes}"
        )
    if programs == 0:
        return
    driver = cuda_driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = programs * header.num_ctas, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = 32 * header.num_warps, 1, 1
    config.sharedMemBytes = header.shared_bytes
    config.hStream = stream
    attributes = _attributes(driver, header)
    config.attrs, config.numAttrs = attributes, len(attributes)
    pointers, _memory = _parameter_array(arguments)
    checked(
        driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0),
        f"launch of {header.kernel} with {programs} programs",
    )


def _attributes(driver: Any, header: KernelHeader) -> list[Any]:
    """Launch attributes, as driver.c of Triton 3.9 sets them: lines 1018 to 1050."""
    kinds = driver.CUlaunchAttributeID
    attributes = []

    def add(kind: Any) -> Any:
        attribute = driver.CUlaunchAttribute()
        attribute.id = kind
        attributes.append(attribute)
        return attribute.value

    if header.dependent:
        value = add(kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
        value.programmaticStreamSerializationAllowed = 1
    if header.cooperative:
        add(kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE).cooperative = 1
    if header.num_ctas > 1:
        cluster = add(kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION).clusterDim
        cluster.x, cluster.y, cluster.z = header.num_ctas, 1, 1
        value = add(kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE)
        spread = driver.CUclusterSchedulingPolicy.CU_CLUSTER_SCHEDULING_POLICY_SPREAD
        value.clusterSchedulingPolicyPreference = spread
    return attributes


def _parameter_array(arguments: Sequence[bytes]) -> tuple[Any, Any]:
    """Addresses of the arguments, each copied to a multiple of 128, and the memory they are in.

    A tensor map must lie at a multiple of 64, the others at one of 8.
    """
    memory = ctypes.create_string_buffer(TENSOR_MAP_BYTES * (len(arguments) + 1))
    address = -(-ctypes.addressof(memory) // TENSOR_MAP_BYTES) * TENSOR_MAP_BYTES
    pointers = (ctypes.c_void_p * len(arguments))()
    for index, argument in enumerate(arguments):
        slot = address + index * TENSOR_MAP_BYTES
        ctypes.memmove(slot, argument, len(argument))
        pointers[index] = slot
    return pointers, memory


def _load(binary: KernelBinary, device: int) -> Function:
    """Loads the module into the current context and lets the kernel have its shared memory."""
    driver, header = cuda_driver(), binary.header
    names = driver.CUdevice_attribute

    def attribute(name: Any) -> int:
        return int(checked(driver.cuDeviceGetAttribute(name, device)))

    major = attribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
    minor = attribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
    if not runs_on(header.sm, 10 * major + minor):
        raise ValueError(
            f"{header.kernel} was compiled for sm_{header.sm}, GPU {device} is an "
            f"sm_{10 * major + minor}: compile it for that"
        )
    limit = attribute(names.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
    if header.shared_bytes > limit:
        raise ValueError(
            f"{header.kernel} asks for {header.shared_bytes} bytes of shared memory, GPU {device} "
            f"has {limit} for a block"
        )
    module = checked(driver.cuModuleLoadData(binary.cubin), f"loading {header.kernel}")
    function = checked(driver.cuModuleGetFunction(module, header.kernel.encode()))
    settings = driver.CUfunction_attribute
    if header.shared_bytes > _DEFAULT_SHARED_BYTES:
        most = settings.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(
            driver.cuFuncSetCacheConfig(function, driver.CUfunc_cache.CU_FUNC_CACHE_PREFER_SHARED)
        )
        checked(driver.cuFuncSetAttribute(function, most, header.shared_bytes))
    if header.num_ctas > _PORTABLE_CLUSTER:
        larger = settings.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        checked(driver.cuFuncSetAttribute(function, larger, 1))
    return function


def checked(answer: tuple[Any, ...], doing: str = "a call of the CUDA driver") -> Any:
    """The result of a driver call, without the error code that comes first.

    Raises:
        RuntimeError: the code is not success.
    """
    code, *results = answer
    if code.value:
        raise RuntimeError(f"{doing} failed: {code.name}")
    return results[0] if results else None
