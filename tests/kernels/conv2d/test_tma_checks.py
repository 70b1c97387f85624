"""The descriptor convolution without running it: what it refuses, costs, and compiles to."""

from dataclasses import replace

import pytest
import torch
import triton

from fastres.kernels.aot import compile_launch, fits
from fastres.kernels.aot.cases import conv2d_tma_cases
from fastres.kernels.conv2d import conv2d_tma, conv2d_tma_cost, conv2d_tma_launches, pack_weight
from fastres.kernels.cost import Target
from fastres.kernels.geometry import ConvShape
from fastres.kernels.tiles import BoxTile
from fastres.kernels.tiles.boxes import Projection, workspace_bytes

HALF = torch.float16
SMALL = BoxTile(1, 4, 4, 64, 16, 4, 2)
X = torch.zeros(1, 8, 8, 16, dtype=HALF)
W = torch.zeros(32, 3, 3, 16, dtype=HALF)
B = torch.zeros(32)
R = torch.zeros(1, 6, 6, 32, dtype=HALF)
X2 = torch.zeros(1, 12, 12, 16, dtype=HALF)
W2 = torch.zeros(32, 16, dtype=HALF)
SHIFTED = torch.zeros(X.numel() + 1, dtype=HALF)[1:].view(X.shape)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, r"x has shape \[8, 8, 16\], expected \[N, H, W, C\]"),
        ({"x": X.double()}, "x has dtype torch.float64"),
        ({"x": X.mT.contiguous().mT}, "x has stride 8 in its last dimension, expected 1"),
        (
            {"x": X.transpose(1, 2), "stride": (2, 2)},
            r"x has strides .*, expected it contiguous",
        ),
        (
            {"x": torch.zeros(1, 8, 8, 20, dtype=HALF)[..., :16]},
            "x has strides of .* bytes, expected multiples of 16",
        ),
        ({"x": SHIFTED}, "x starts 2 bytes past a multiple of 16"),
        ({"x": X.float(), "weight": W.float()}, "cannot take this convolution: fp32 in full"),
        ({"weight": W[0]}, r"weight has shape \[3, 3, 16\], expected \[K, R, S, C\]"),
        ({"weight": W[..., :8]}, r"weight has shape \[32, 72\], expected \[32, 144\]"),
        ({"weight": W.float()}, "weight has dtype torch.float32, expected torch.float16"),
        ({"weight": W.to("meta")}, "weight is on meta, expected cpu"),
        ({"bias": B[:8]}, r"bias has shape \[8\], expected \[32\]"),
        ({"bias": B.bfloat16()}, "bias has dtype torch.bfloat16, expected torch.float32 or"),
        ({"residual": R[:, :5]}, r"residual has shape \[1, 5, 6, 32\], expected \[1, 6, 6, 32\]"),
        ({"residual": R.transpose(1, 2)}, "residual has strides"),
        ({"out": R[..., :8]}, r"out has shape \[1, 6, 6, 8\]"),
        ({"out": R.float()}, "out has dtype torch.float32"),
        ({"x2": X2}, "x2 and weight2 go together"),
        ({"weight2": W2}, "x2 and weight2 go together"),
        ({"x2": X2, "weight2": W2}, r"x2 has 12x12 pixels, 12x12 at stride2 .*; expected 6x6"),
        ({"x2": X2, "weight2": W2, "stride2": (0, 1)}, r"stride2 is \(0, 1\), expected at least 1"),
        ({"x2": X2[0], "weight2": W2, "stride2": (2, 2)}, r"x2 has shape \[12, 12, 16\]"),
        ({"x2": X2, "weight2": W2[:8], "stride2": (2, 2)}, r"weight2 has shape \[8, 16\]"),
        (
            {"x2": X2, "weight2": W2.view(64, 8)[:32], "stride2": (2, 2)},
            r"weight has shape \[32, 152\]",
        ),
        ({"stride2": (2, 2)}, r"stride2 is \(2, 2\) with no x2"),
        ({"stride": (3, 3)}, r"stride is \(3, 3\), expected \(1, 1\) or \(2, 2\)"),
        ({"dilation": (4, 1)}, "does not fit into 8x8"),
        (
            {"tile": BoxTile(1, 8, 8, 64, 64, 4, 3)},
            "cannot run this convolution: a step of 64 channels does not divide 16",
        ),
        ({"tile": replace(SMALL, split_k=2)}, "split_k 2 does not divide 9 steps"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "-".join(value),
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        conv2d_tma(**{"x": X, "weight": W, "bias": B} | arguments)


@pytest.mark.parametrize(
    ("workspace", "message"),
    [
        (None, "workspace is missing, expected 3456 fp32 for tile"),
        (torch.zeros(3455), "workspace is of 3455 elements, expected 3456 fp32"),
        (torch.zeros(3456, dtype=HALF), "workspace has dtype torch.float16"),
        (torch.zeros(3457)[1:], "workspace starts 4 bytes past a multiple of 16"),
    ],
    ids=["missing", "small", "dtype", "shifted"],
)
def test_rejects_workspace(workspace, message):
    shape = ConvShape(1, 8, 8, 16, 32, 3, 3)
    tile = replace(SMALL, split_k=3)
    assert workspace_bytes(shape, tile) == 4 * 3456
    assert workspace_bytes(shape, SMALL) == 0
    with pytest.raises(ValueError, match=message):
        conv2d_tma_launches(
            X,
            pack_weight(W),
            None,
            None,
            R,
            shape=shape,
            target=Target.typical(90),
            tile=tile,
            workspace=workspace,
        )


def test_rejects_older_targets():
    shape = ConvShape(1, 8, 8, 16, 32, 3, 3)
    with pytest.raises(ValueError, match="sm_80 has no copy engine for boxes"):
        conv2d_tma_launches(
            X, pack_weight(W), None, None, R, shape=shape, target=Target.typical(80)
        )


def test_cost_counts_a_strided_1x1_by_what_it_reads():
    head = ConvShape(2, 28, 28, 128, 512, 1, 1)
    cost = conv2d_tma_cost(head, 2, Projection(256, (2, 2)), residual=True)
    m = 2 * 28 * 28
    assert cost.flops == 2 * m * 512 * (128 + 256)
    assert cost.bytes == 2 * (m * (128 + 256 + 512 + 512) + 512 * (128 + 256))
    strided = conv2d_tma_cost(ConvShape(2, 56, 56, 256, 512, 1, 1, (2, 2)), 2)
    assert strided.bytes == 2 * (m * (256 + 512) + 512 * 256)


# ---------------------------------------------------------------- machine code

TABLE = list(conv2d_tma_cases(90))
OTHERS = ("layer2.0.conv2.boxes-b256", "layer2.1.conv3.boxes-b256", "layer4.0.conv3+downsample")
COMPILED = [(90, case) for case in TABLE] + [
    (sm, case)
    for sm in (100, 120)
    for case in conv2d_tma_cases(sm)
    if case.name.startswith(OTHERS) and case.name.endswith("fp16")
]
MATRIX = {90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@pytest.mark.compile
@pytest.mark.parametrize(
    ("sm", "case"), COMPILED, ids=[f"sm_{sm}-{case.name}" for sm, case in COMPILED]
)
def test_machine_code(sm, case):
    facts = compile_launch(case.launch, sm)
    # sm_120: the compiler keeps a few addresses of the epilogue in local memory, outside the loop
    local = 96 if triton.__version__.startswith("3.6.") else 64
    assert max(facts.spill_stores, facts.spill_loads) <= (local if sm == 120 else 0)
    assert fits(facts, sm)
    if ".sum" in case.name:
        assert facts.count("LDG", "128") > 0
        return
    assert facts.count("UTMALDG") > 0 and facts.count("UTMASTG") > 0
    for other, instruction in MATRIX.items():
        assert (facts.count(instruction) > 0) == (other == sm), facts.instructions
    names = ("BOX_N", "BOX_P", "BOX_Q", "BLOCK_N", "BLOCK_K")
    sides = [case.launch.constants[name] for name in names]
    launch, itemsize = case.launch, case.launch.arguments["x"].base.element_size()
    tile = BoxTile(*sides, launch.num_warps, launch.num_stages, launch.constants["SPLIT_K"])
    # in one loop over tiles and steps the next tile's boxes do not make way for a residual
    apart = launch.constants["FLATTEN"] and launch.arguments["residual"] is not None
    assert facts.shared_bytes <= tile.shared_bytes(itemsize, residual_apart=apart)


def test_table_has_nothing_for_older_targets():
    assert list(conv2d_tma_cases(89)) == []
    for case in TABLE:
        assert all(tensor.device.type == "meta" for tensor in case.launch.tensors())
