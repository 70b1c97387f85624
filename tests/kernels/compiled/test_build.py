"""The layout of parameters against two who know it: the PTX that was compiled, and Triton."""

import re
import runpy
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastres.kernels.aot import compile_kernel, source_of
from fastres.kernels.compiled.binary import KernelBinary
from fastres.kernels.compiled.build import arguments_of, binary_of, values_of
from fastres.kernels.compiled.tensor_map import BoxLayout, TensorView

CASES = runpy.run_path(str(Path(__file__).with_name("driver_cases.py")))["CASES"]
LAUNCHES = {case.name: case.launch for case in CASES}
PTX_TYPES = {"u32": ("i32", 4), "u64": ("i64", 8), "f32": ("fp32", 4)}

pytestmark = pytest.mark.compile
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def encode(tensor) -> bytes:
    return bytes(128)


def ptx_parameters(ptx: str) -> list[tuple[str, int]]:
    """Kind and bytes of each parameter, as the entry point declares them."""
    found = []
    for line in re.search(r"\.entry \w+\((.*?)\)", ptx, re.S)[1].split(","):
        words = line.split()
        assert words[0] == ".param"
        if ".b8" in words:
            found.append(("map", int(re.search(r"\[(\d+)\]", line)[1])))
        elif ".ptr" in words:
            found.append(("pointer", 8))
        else:
            found.append(PTX_TYPES[words[1].strip(".")])
    return found


def triton_types(launch, metadata) -> list[str]:
    """What Triton's launcher makes of the signature: 3.9 by a function, 3.6 as C source."""
    signature = source_of(launch).signature
    from triton.backends import driver as any_driver
    from triton.backends.nvidia import driver as nvidia

    if hasattr(any_driver, "expand_signature"):
        types = any_driver.expand_signature(
            signature.values(), metadata.tensordesc_meta, "nvTmaDesc"
        )
        return [kind for kind in types if kind != "constexpr"]
    source = nvidia.make_launcher({}, signature, metadata.tensordesc_meta)
    declared = re.search(r"CUdeviceptr profile_scratch, (.*?)\) \{", source)[1].split(", ")
    return [declaration.rsplit(" ", 1)[0] for declaration in declared]


def as_c(kind: str) -> str:
    """Triton's names for types and those of its C source, told alike."""
    if kind.startswith(("*", "CUdeviceptr")):
        return "pointer"
    if kind.startswith(("tensordesc", "nvTmaDesc", "CUtensorMap")):
        return "map"
    return {"int32_t": "i32", "int64_t": "i64", "uint32_t": "fp32"}.get(kind, kind)


@every_case
def test_layout_is_that_of_the_ptx(case):
    launch = case.launch("meta")
    binary = binary_of(launch, 90)
    expected = ptx_parameters(compile_kernel(launch, 90).asm["ptx"])
    found = [(as_c(parameter.type), parameter.size) for parameter in binary.header.parameters]
    assert found == expected
    packed = arguments_of(launch, binary, encode=encode)
    assert [len(value) for value in packed] == [size for _, size in expected]


@every_case
def test_layout_is_that_of_tritons_launcher(case):
    launch = case.launch("meta")
    expected = triton_types(launch, compile_kernel(launch, 90).metadata)
    *ours, global_scratch, profile_scratch = binary_of(launch, 90).header.parameters
    assert [as_c(parameter.type) for parameter in ours] == [as_c(kind) for kind in expected]
    assert (global_scratch.part, profile_scratch.part) == ("global scratch", "profile scratch")


@every_case
def test_binary_survives_saving(case):
    binary = binary_of(case.launch("meta"), 90)
    assert KernelBinary.from_parts(binary.to_json(), binary.cubin) == binary


def test_header():
    header = binary_of(LAUNCHES["box-copy-dependent"]("meta"), 90).header
    assert (header.kernel, header.sm, header.num_warps) == ("_box_copy_kernel", 90, 4)
    assert header.dependent and not header.cooperative and header.num_ctas == 1
    assert header.constants == {"offset": 1, "TILES_H": 2, "WAIT": True}
    assert header.boxes == {
        "x_desc": BoxLayout(6, 2, 3, (2, 4, 8, 64)),  # rows of 128 bytes
        "y_desc": BoxLayout(7, 4, 3, (2, 4, 8, 32)),  # those of 256 go in two copies
    }
    assert header.shared_bytes >= 2 * 4 * 8 * 64 * 4
    assert not binary_of(LAUNCHES["box-copy"]("meta"), 90).header.dependent


def test_element_types_are_those_of_the_driver():
    header = binary_of(LAUNCHES["box-copy-bf16-nan"]("meta"), 90).header
    assert header.boxes["x_desc"].element_type == 9  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16


def test_far_strides_take_64_bits():
    launch = LAUNCHES["conv2d-64-bit-stride"]("meta")
    binary = binary_of(launch, 90)
    packed = arguments_of(launch, binary, encode=encode)
    types = {
        p.argument: (p.type, value)
        for p, value in zip(binary.header.parameters, packed, strict=True)
    }
    assert types["stride_xn"] == ("i64", struct.pack("<q", 2**31))
    assert types["stride_xh"] == ("i32", struct.pack("<i", 512))
    assert "bias_ptr" not in types and binary.header.constants["bias_ptr"] is None


def test_values_know_no_torch():
    values = values_of(LAUNCHES["box-copy-bf16-nan"]("meta"))
    assert values["x_desc"] == TensorView(0, (3, 6, 8, 64), (3072, 512, 64, 1), fill_nan=True)
    assert values["scale"] == 0.5 and values["offset"] == 1
    assert values_of(LAUNCHES["max-pool"]("meta"))["x_ptr"] == 0


def test_sm_80_takes_pointer_kernels():
    binary = binary_of(LAUNCHES["max-pool"]("meta"), 80)
    assert binary.header.sm == 80 and binary.cubin.startswith(b"\x7fELF")


def test_refuses_descriptors_where_there_is_no_copy_engine():
    with pytest.raises(ValueError, match=r"\['x_desc', 'y_desc'\].* need sm_90 .* is sm_80"):
        binary_of(LAUNCHES["box-copy"]("meta"), 80)
    dependent = replace(LAUNCHES["max-pool"]("meta"), dependent=True)
    with pytest.raises(ValueError, match="dependent launch True, which need sm_90"):
        binary_of(dependent, 80)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"constants": {"TILES_H": 3, "WAIT": False}}, "compiled for constants .*'TILES_H': 2"),
        ({"offset": 2}, "compiled for arguments"),
        ({"scale": None}, "compiled for arguments"),
        ({"y_desc": torch.empty(8, device="meta")}, "compiled for arguments"),
        ({"dependent": True}, "compiled for dependent launch False, this launch has True"),
    ],
    ids=["constant", "specialised", "type", "descriptor", "dependent"],
)
def test_refuses_another_specialisation(changes, message):
    launch = LAUNCHES["box-copy"]("meta")
    binary = binary_of(launch, 90)
    fields = {name: changes[name] for name in changes if name in ("constants", "dependent")}
    others = {name: changes[name] for name in changes if name not in fields}
    other = replace(launch, arguments={**launch.arguments, **others}, **fields)
    with pytest.raises(ValueError, match=message):
        arguments_of(other, binary, encode=encode)


def test_refuses_sizes_that_are_no_multiples():
    launch = LAUNCHES["conv2d"]("meta")
    binary = binary_of(launch, 90)
    other = replace(launch, arguments={**launch.arguments, "stride_xw": 60})
    with pytest.raises(ValueError, match="stride_xw is 60, expected a multiple of 16"):
        arguments_of(other, binary, encode=encode)
