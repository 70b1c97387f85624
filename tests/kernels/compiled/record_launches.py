"""Prints what Triton's JIT and what our driver ask of a fake CUDA driver, as JSON.

Run by test_driver.py with LD_LIBRARY_PATH at the fake libcuda.so.1, and FAKE_CUDA_LOG set.
"""

import ctypes
import json
import os
from pathlib import Path

import msgspec
import torch
from driver_cases import CASES
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver as active

from fastres.kernels.compiled.binary import KernelBinary
from fastres.kernels.compiled.build import arguments_of, binary_of
from fastres.kernels.compiled.driver import DriverModule, encode_tensor_map, launch, use_device

STREAM = 0x5EED
SM = 90


class OnHopper(CudaDriver):
    """Triton's own driver and launcher, but for what it asks torch.cuda."""

    def __init__(self) -> None:
        super().__init__()
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device: STREAM
        self.get_device_capability = lambda device: divmod(SM, 10)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", SM, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def expect(binary: KernelBinary) -> None:
    """Tells the fake driver how large the parameters are that it will be handed."""
    library = ctypes.CDLL("libcuda.so.1")
    sizes = [parameter.size for parameter in binary.header.parameters]
    ctypes.c_int.in_dll(library, "fake_parameters").value = len(sizes)
    (ctypes.c_size_t * 256).in_dll(library, "fake_sizes")[: len(sizes)] = sizes


def log() -> list[str]:
    """What was asked since the last call."""
    path = Path(os.environ["FAKE_CUDA_LOG"])
    lines = path.read_text().splitlines()
    path.write_text("")
    return lines


def clusters(binary: KernelBinary, arguments: list[bytes]) -> list[str]:
    """The launch of a kernel in clusters of 16, as if it had been compiled for them."""
    changed = msgspec.structs.replace(binary.header, num_ctas=16, dependent=True, cooperative=True)
    function = DriverModule(KernelBinary(changed, binary.cubin)).function()
    launch(changed, function, arguments, 3, STREAM)
    launch(changed, function, arguments, 0, STREAM)
    return [line for line in log() if line.split()[0] in ("allow", "launch")]


def refusals(binary: KernelBinary) -> dict[str, str]:
    """What is said of machine code that the fake GPU cannot run, and of a GPU that is not there."""

    def load(**changes: int) -> None:
        header = msgspec.structs.replace(binary.header, **changes)
        DriverModule(KernelBinary(header, binary.cubin)).function()

    tries = {
        "target": lambda: load(sm=100),
        "shared memory": lambda: load(shared_bytes=300_000),
        "device": lambda: use_device(1),
    }
    found = {}
    for name, attempt in tries.items():
        try:
            attempt()
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def main() -> None:
    active.set_active(OnHopper())
    found: dict[str, object] = {}
    for case in CASES:
        call = case.launch("cpu")
        binary = binary_of(call, SM)
        expect(binary)
        call.kernel[(call.programs,)](**call.arguments, **call.constants, **call.options)
        by_triton = log()
        module = DriverModule(KernelBinary.from_parts(binary.to_json(), binary.cubin))
        function = module.function()
        arguments = arguments_of(call, binary, encode=encode_tensor_map)
        assert module.function() is function, "loaded twice"
        launch(binary.header, function, arguments, call.programs, STREAM)
        found[case.name] = {"triton": by_triton, "ours": log()}
    found["clusters"] = clusters(binary, arguments)
    found["refusals"] = refusals(binary)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
