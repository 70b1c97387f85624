from dataclasses import dataclass, replace

import msgspec
import pytest

from fastres.kernels.compiled.tensor_map import BoxLayout, TensorView, tensor_map

FP16 = BoxLayout(element_type=6, element_size=2, swizzle=3, box=(2, 8, 8, 64))
FP32 = BoxLayout(element_type=7, element_size=4, swizzle=3, box=(2, 8, 8, 32))
VIEW = TensorView(0x1000, (256, 56, 56, 128), (56 * 56 * 128, 56 * 128, 128, 1))


@dataclass(frozen=True)
class Case:
    """Worked out by hand from the manual of cuTensorMapEncodeTiled."""

    name: str
    view: TensorView
    layout: BoxLayout
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_type: int
    span: int  # bytes before the last element


CASES = (
    Case(
        name="images",
        view=VIEW,
        layout=FP16,
        sizes=(128, 56, 56, 256),
        strides=(256, 14_336, 802_816),
        box=(64, 8, 8, 2),
        element_type=6,
        span=205_520_894,
    ),
    Case(
        name="every-second-pixel",
        view=TensorView(0x20, (1, 28, 28, 64), (200_704, 7168, 128, 1)),
        layout=FP32,
        sizes=(64, 28, 28, 1),
        strides=(512, 28_672, 802_816),
        box=(32, 8, 8, 2),
        element_type=7,
        span=252 + 27 * 512 + 27 * 28_672,
    ),
    Case(
        name="tf32",
        view=TensorView(0, (16, 32), (32, 1), tf32=True),
        layout=BoxLayout(7, 4, 3, (8, 32)),
        sizes=(32, 16),
        strides=(128,),
        box=(32, 8),
        element_type=11,
        span=124 + 15 * 128,
    ),
    Case(
        name="one-dimension",
        view=TensorView(0, (1000,), (1,)),
        layout=BoxLayout(9, 2, 0, (256,)),
        sizes=(1000,),
        strides=(),
        box=(256,),
        element_type=9,
        span=1998,
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_order_and_units(case):
    found = tensor_map("x", case.view, case.layout)
    assert (found.sizes, found.strides, found.box) == (case.sizes, case.strides, case.box)
    assert (found.element_type, found.element_size) == (case.element_type, case.layout.element_size)
    assert (found.address, found.swizzle) == (case.view.address, case.layout.swizzle)
    assert found.span == case.span


def test_cases_are_apart():
    assert len({replace(case, name="") for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"address": 8}, "x lies at address 0x8, expected a multiple of 16"),
        ({"shape": (1, 8, 64)}, r"x has shape \[1, 8, 64\].* expected 4 of each"),
        ({"strides": (1024, 64, 1)}, r"strides \[1024, 64, 1\], expected 4 of each"),
        ({"strides": (401_408, 7168, 128, 2)}, "x has stride 2 in its last dimension"),
        ({"strides": (401_408, 7168, 12, 1)}, "24] bytes, expected multiples of 16 below"),
        ({"strides": (2**39, 7168, 128, 1)}, "expected multiples of 16 below"),
        ({"strides": (-128, 7168, 128, 1)}, "expected multiples of 16 below"),
        ({"shape": (0, 56, 56, 128)}, r"x has shape \[0, .* expected sizes from 1"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "-".join(value),
)
def test_refuses_what_the_copy_engine_cannot_do(changes, message):
    with pytest.raises(ValueError, match=message):
        tensor_map("x", msgspec.structs.replace(VIEW, **changes), FP16)


def test_refuses_nan_among_integers():
    view = TensorView(0, (64, 64), (64, 1), fill_nan=True)
    with pytest.raises(ValueError, match="x is filled with NaN"):
        tensor_map("x", view, BoxLayout(0, 1, 0, (8, 64)))
