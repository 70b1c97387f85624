"""The launches of 8 bits worth compiling for every target: ResNet-50's kinds of layers.

`python -m fastres.kernels.aot_table_int8 --sm 90` prints what each one's machine code uses.
"""

import argparse
from collections.abc import Iterator

import torch

from fastres.kernels.aot_table import (
    BOXES,
    CLASSIFIER,
    CONV_1X1,
    CONV_3X3,
    LAYERS,
    STEM,
    CompileCase,
    boxes_cases,
    conv2d_case,
    print_table,
)
from fastres.kernels.cost import Target

INT8, FP8, HALF = torch.int8, torch.float8_e4m3fn, torch.float16


def byte_cases(sm: int) -> Iterator[CompileCase]:
    """Every family's cases for one target: int8, and fp8 where the target has it."""
    yield from conv2d_cases(sm)
    yield from conv2d_tma_cases(sm)


def conv2d_cases(sm: int) -> Iterator[CompileCase]:
    """ResNet-50's kinds of convolution over pointers, with a classifier that gives floats."""
    target = Target.typical(sm)
    for layer in LAYERS:
        if layer not in (STEM, CLASSIFIER):
            yield conv2d_case(layer, 256, INT8, target)
    for layer in (CONV_3X3, CONV_1X1):
        yield conv2d_case(layer, 1, INT8, target)
        if sm >= 89:
            yield conv2d_case(layer, 256, FP8, target)
    for batch in (256, 1):
        yield conv2d_case(CLASSIFIER, batch, INT8, target, out_dtype=HALF)


def conv2d_tma_cases(sm: int) -> Iterator[CompileCase]:
    """ResNet-50's convolutions after the stem at batch 256 and 1; none below sm_90."""
    if sm < 90:
        return
    for name, boxes in BOXES.items():
        for n in (256, 1):
            yield from boxes_cases(name, boxes, n, INT8, sm)
        yield from boxes_cases(name, boxes, 256, FP8, sm)


def main() -> None:
    """Prints the table for one target."""
    parser = argparse.ArgumentParser(
        prog="python -m fastres.kernels.aot_table_int8", description=__doc__
    )
    parser.add_argument("--sm", type=int, default=90, help="compute capability times ten")
    sm = parser.parse_args().sm
    print_table(byte_cases(sm), sm)


if __name__ == "__main__":
    main()
