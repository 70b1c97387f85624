"""Binaries as data: written out by hand, so that neither torch nor triton is needed."""

import hashlib
import struct
import subprocess
import sys

import msgspec
import pytest

from fastres.kernels.compiled.binary import KernelBinary, KernelHeader, Parameter, Scratch, pack
from fastres.kernels.compiled.tensor_map import BoxLayout, TensorView

CUBIN = b"\x7fELF machine code"
HEADER = KernelHeader(
    kernel="_kernel",
    sm=90,
    num_warps=4,
    num_ctas=1,
    shared_bytes=16_392,
    global_scratch=Scratch(0, 1),
    profile_scratch=Scratch(0, 1),
    dependent=False,
    cooperative=False,
    parameters=(
        Parameter("x_ptr", "*fp16", divisor=16),
        Parameter("y_desc", "tensordesc<fp16[8, 64]>"),
        Parameter("y_desc", "i32", "shape", 0),
        Parameter("y_desc", "i32", "shape", 1),
        Parameter("y_desc", "i64", "stride", 0),
        Parameter("y_desc", "i64", "stride", 1),
        Parameter("M", "i32"),
        Parameter("stride", "i64", divisor=16),
        Parameter("scale", "fp32"),
        Parameter("", "*i8", "global scratch"),
        Parameter("", "*i8", "profile scratch"),
    ),
    boxes={"y_desc": BoxLayout(6, 2, 3, (8, 64))},
    constants={"C": 64, "bias_ptr": None, "W": 1, "ACTIVATION": "relu", "WIDEN": False},
    triton="3.9.0",
    sha256=hashlib.sha256(CUBIN).hexdigest(),
)
VIEW = TensorView(0x4000, (100, 64), (128, 1))
VALUES = {"x_ptr": 0x7F00_0000_0100, "y_desc": VIEW, "M": -7, "stride": 2**31, "scale": 0.5}
MAP = bytes(range(128))


def packed(values, header=HEADER, **options):
    return pack(header, values, encode=lambda tensor: MAP, **options)


def test_packs_in_c_order():
    expected = [
        bytes.fromhex("00010000007f0000"),
        MAP,
        bytes.fromhex("64000000"),
        bytes.fromhex("40000000"),
        bytes.fromhex("8000000000000000"),
        bytes.fromhex("0100000000000000"),
        bytes.fromhex("f9ffffff"),
        bytes.fromhex("0000008000000000"),
        bytes.fromhex("0000003f"),
        bytes(8),
        bytes(8),
    ]
    assert packed(VALUES) == expected
    assert [len(value) for value in expected] == [p.size for p in HEADER.parameters]


def test_compiled_in_arguments_may_be_given():
    assert packed(VALUES | {"bias_ptr": None, "W": 1, "C": 64}) == packed(VALUES)


def test_scratch_memory_comes_last():
    header = msgspec.structs.replace(HEADER, global_scratch=Scratch(1024, 128))
    *_, global_scratch, profile_scratch = packed(VALUES, header, global_scratch=0x1080)
    assert (global_scratch, profile_scratch) == (struct.pack("<Q", 0x1080), bytes(8))
    for address in (0, 0x1040):
        with pytest.raises(ValueError, match="the global scratch lies at .* a multiple of 128"):
            packed(VALUES, header, global_scratch=address)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_ptr": 0x108}, "x_ptr is 264, expected a multiple of 16"),
        ({"x_ptr": -16}, r"x_ptr is -16, expected a \*fp16"),
        ({"x_ptr": None}, r"x_ptr is None, expected a \*fp16"),
        ({"x_ptr": VIEW}, r"x_ptr is TensorView.* expected a \*fp16"),
        ({"y_desc": 0x4000}, "y_desc is 16384, expected a TensorView"),
        ({"y_desc": TensorView(8, (100, 64), (128, 1))}, "y_desc lies at address 0x8"),
        ({"y_desc": TensorView(0, (2**31, 64), (128, 1))}, "y_desc shape is 2147483648"),
        ({"M": 2**31}, "M is 2147483648, expected a i32"),
        ({"M": 0.5}, "M is 0.5, expected a i32"),
        ({"M": True}, "M is True, expected a i32"),
        ({"stride": 24}, "stride is 24, expected a multiple of 16"),
        ({"scale": 1e39}, "scale is 1e[+]39, expected a fp32"),
        ({"bias_ptr": 0x100}, "bias_ptr is 256, compiled in is None"),
        ({"W": 2}, "W is 2, compiled in is 1"),
        ({"ACTIVATION": "silu"}, "ACTIVATION is 'silu', compiled in is 'relu'"),
        ({"N": 3}, r"_kernel was given \['N'\] that it does not take"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "-".join(value),
)
def test_refuses_values_it_was_not_compiled_for(changes, message):
    with pytest.raises(ValueError, match=message):
        packed(VALUES | changes)


def test_refuses_missing_values():
    with pytest.raises(ValueError, match=r"and not \['M', 'scale'\] that it takes"):
        packed({name: value for name, value in VALUES.items() if name not in ("M", "scale")})


def test_json_keeps_everything():
    binary = KernelBinary(HEADER, CUBIN)
    assert KernelBinary.from_parts(binary.to_json(), CUBIN) == binary


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"num_warps": 4', b'"num_warps": "4"', "no header .*num_warps"),
        (b'"num_warps": 4', b'"num_warps": 4, "more": 1', "unknown field `more`"),
        (b'"schema": 1', b'"schema": 2', "schema"),
        (b'"*fp16"', b'"fp16"', "no header .* Parameter"),
        (b'"fp32"', b'"tensordesc<fp16[8, 64]>"', "no header .* Parameter"),
        (b'"dim": 1', b'"dim": 2', "no header .* Parameter"),
        (b"{", b"[", "no header"),
        (b"_kernel", b"\xff", "no header"),
    ],
    ids=["type", "field", "schema", "parameter", "descriptor", "dim", "syntax", "encoding"],
)
def test_refuses_other_json(old, new, message):
    text = KernelBinary(HEADER, CUBIN).to_json()
    assert old in text
    with pytest.raises(ValueError, match=message):
        KernelBinary.from_parts(text.replace(old, new, 1), CUBIN)


def test_refuses_other_machine_code():
    with pytest.raises(ValueError, match="digest .* damaged or another kernel's"):
        KernelBinary.from_parts(KernelBinary(HEADER, CUBIN).to_json(), CUBIN + b"\0")


def test_unpacking_loads_neither_torch_nor_triton(tmp_path):
    (tmp_path / "kernel.json").write_bytes(KernelBinary(HEADER, CUBIN).to_json())
    (tmp_path / "kernel.cubin").write_bytes(CUBIN)
    code = """
import sys
from pathlib import Path
from fastres.kernels.compiled import driver
from fastres.kernels.compiled.binary import KernelBinary
folder = Path(sys.argv[1])
text, cubin = ((folder / f"kernel.{kind}").read_bytes() for kind in ("json", "cubin"))
print(driver.DriverModule(KernelBinary.from_parts(text, cubin)).binary.header.kernel)
print(sorted({"torch", "triton", "numpy"} & set(sys.modules)))
"""
    command = [sys.executable, "-P", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["_kernel", "[]"]
