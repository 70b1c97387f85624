"""Deep sums of fp8: what the tensor cores add by themselves, and what is added up in fp32."""

import re
from dataclasses import replace

import pytest
import torch

from fastres.kernels.aot import compile_kernel, facts_of
from fastres.kernels.aot.cases_int8 import byte_cases
from fastres.kernels.conv2d import conv2d, conv2d_tma
from fastres.kernels.cost import Target
from fastres.kernels.geometry import ConvShape
from fastres.kernels.linear import linear
from fastres.kernels.quantised import by_steps
from fastres.kernels.tiles import BoxTile, ConvTile
from fastres.kernels.tiles.boxes import Projection, tile_refusal
from fastres.kernels.tiles.depth import summed_by_steps
from fastres.tolerances import FP8_SUM_RMS, errors

FP8, FP32 = torch.float8_e4m3fn, torch.float32
H200, DEPTH = Target.typical(90), 4608  # ResNet's deepest: a 3x3 over 512 channels
CASES = {case.name: case for case in byte_cases(90) if "fp8" in case.name}


def values(*shape, even=False, seed=0):
    """Of one sign, as after a ReLU, up to the largest fp8; even: as likely large as small."""
    random = torch.Generator().manual_seed(seed)
    draw = torch.rand if even else lambda *s, **k: torch.randn(*s, **k).abs()
    x = draw(*shape, generator=random)
    return (x * (448 / x.max())).to(FP8)


# ---------------------------------------------------------------- a model of sm_90's tensor cores


def cut(x, exponent):
    """x without what lies beyond 13 bits behind the point of numbers with this exponent."""
    unit = torch.exp2(exponent - 13)
    return torch.trunc(x / unit) * unit


def exponent(x):
    return torch.floor(torch.log2(x.abs().clamp_min(1e-30)))


def tensor_cores(products, at_a_time):
    """Sums over the last dimension: 32 products an instruction, cut off, and of so many in fp32.

    As the reports have it that `tiles.depth.summed_by_steps` names.
    """
    total = torch.zeros(products.shape[:-1], dtype=torch.float64)
    for step in products.split(at_a_time, -1):
        acc = torch.zeros_like(total)
        for part in step.split(32, -1):
            largest = torch.maximum(exponent(acc), exponent(part).amax(-1))
            acc = cut(acc, largest) + cut(part, largest[..., None]).sum(-1)
            acc = cut(acc, exponent(acc))
        total = (total + acc).float().double()
    return total


@pytest.mark.parametrize("even", [False, True])
def test_the_bound_tells_long_sums_in_the_tensor_cores_from_short_ones(even):
    x, w = (values(12, DEPTH, even=even, seed=seed).double() for seed in range(2))
    products = x[:, None] * w
    exact = products.sum(-1)
    for at_a_time, passes in ((DEPTH, False), (512, False), (256, True), (128, True)):
        found = errors(tensor_cores(products, at_a_time), exact)
        assert (found.rms <= FP8_SUM_RMS) is passes, f"{at_a_time} at a time: {found.rms}"


# ---------------------------------------------------------------- the kernels


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("form", ["pointers", "boxes", "classifier"])
def test_4608_products(form, even, device, poisoned):
    """In Triton's interpreter sums are fp32's in any case: what is compiled in, a GPU shows."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("needs fp8, sm_89 or newer")
    if device.type == "cuda" and form == "boxes" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs boxes, sm_90 or newer")
    x, weight = values(1, 3, 3, 512, even=even), values(64, 3, 3, 512, even=even, seed=1)
    scale = torch.full((64,), 2.0**-20)
    exact = (x.double().view(-1) * weight.double().view(64, -1)).sum(-1) * 2.0**-20
    given = x.to(device), weight.to(device)
    out = poisoned((1, 1, 1, 64), FP32, device)
    if form == "classifier":
        flat = (v.reshape(len(v), -1) for v in given)
        linear(*flat, scale=scale.to(device), out=out.view(1, 64))
    else:
        run = conv2d_tma if form == "boxes" else conv2d
        run(*given, scale=scale.to(device), out=out)
    found = errors(out.cpu().view(-1), exact)
    assert found.rms <= FP8_SUM_RMS, found


def test_where_sums_are_made_by_steps():
    for sm in (80, 86, 89, 90, 100, 103, 120):
        target = Target.typical(sm)
        assert summed_by_steps(DEPTH, target) is (sm in (89, 90))
        assert not summed_by_steps(256, target)
        assert not by_steps(torch.int8, DEPTH, target)
        assert not by_steps(torch.float16, DEPTH, target)
    assert by_steps(FP8, 257, H200)


@pytest.mark.parametrize(
    ("name", "by_steps", "of_next"),
    [
        ("layer4.1.conv3", True, None),
        ("layer4.1.conv2.boxes", True, None),
        ("layer3.1.conv3.boxes", False, None),  # 256 channels
        ("layer4.0.conv3+downsample.boxes", True, None),
        ("layer2.0.conv3+downsample.boxes", False, None),  # 128, and 256 of the projection
        ("layer2.1.chain", True, True),
        ("layer1.1.chain", True, False),  # the next 1x1 reads 256
        ("conv1.folded", False, None),  # 147 products, and zeros
    ],
)
def test_launches_ask_for_it(name, by_steps, of_next):
    constants = CASES[f"{name}-b256-fp8e4nv"].launch.constants
    assert (constants["BY_STEPS"], constants.get("NEXT_BY_STEPS")) == (by_steps, of_next)


def test_parts_of_a_split_depth_are_short():
    shape = ConvShape(1, 7, 7, 512, 512, 3, 3, padding=(1, 1))
    depths = [BoxTile(1, 4, 4, 64, 128, 4, 3, split).depth(shape) for split in (1, 9, 12)]
    assert depths == [4608, 512, 384]
    assert BoxTile(1, 4, 4, 64, 128, 4, 3).depth(shape, Projection(8192)) == 8192


def test_tiles_leave_room_for_both_sums():
    shape = ConvShape(256, 7, 7, 512, 512, 3, 3, padding=(1, 1))
    wide, narrow = BoxTile(256, 1, 1, 128, 128, 8, 2), BoxTile(128, 1, 1, 128, 128, 8, 2)
    assert tile_refusal(wide, shape, 1, H200) is None  # of int8
    assert "128 accumulators a thread, and as" in tile_refusal(wide, shape, 1, H200, fp8=True)
    assert tile_refusal(narrow, shape, 1, H200, fp8=True) is None
    assert tile_refusal(wide, shape, 1, Target.typical(100), fp8=True) is None
    shallow = ConvShape(256, 7, 7, 256, 512, 1, 1)
    assert tile_refusal(wide, shallow, 1, H200, fp8=True) is None


@pytest.mark.compile
@pytest.mark.parametrize(
    ("name", "adds"),  # registers of a step's sum, by steps in a row where the loop is unrolled
    [
        ("layer4.1.conv2.boxes", 64),
        ("layer4.0.conv3+downsample.boxes", 2 * 64),
        ("layer2.1.chain", 2 * 64),
        ("layer1.0.conv2", 64),
        ("layer4.1.conv3", 4 * 64),
    ],
)
def test_each_step_is_added_up_in_fp32(name, adds):
    """In the machine code: as many more additions as a thread has sums, and room for both."""
    launch = CASES[f"{name}-b256-fp8e4nv"].launch
    kernel = compile_kernel(launch, 90)
    constants = {**launch.constants, "BY_STEPS": False}
    if "NEXT_BY_STEPS" in constants:
        constants["NEXT_BY_STEPS"] = False
    long = facts_of(compile_kernel(replace(launch, constants=constants), 90))
    found = facts_of(kernel)
    assert found.count("FADD") - long.count("FADD") == adds
    assert found.count("QGMMA") > 0 and found.spill_stores == 0
    # the first instruction of a step starts from nothing: its scale-d is 0
    firsts = re.findall(
        r"wgmma\.mma_async\S*e4m3\.e4m3 \{[^}]*\}, \S+, \S+, 0, 1, 1", kernel.asm["ptx"]
    )
    assert firsts, "every instruction adds to the sum before it"


@pytest.mark.compile
@pytest.mark.parametrize(("sm", "adds"), [(89, 32), (120, 0)])
def test_other_gpus(sm, adds):
    tile = ConvTile(128, 64, 64, 8, 3)
    launch = next(c.launch for c in byte_cases(sm) if c.name == "layer1.0.conv2-b256-fp8e4nv")
    assert launch.constants["BY_STEPS"] is (adds > 0) and tile.accumulators() == 32
    found = [
        facts_of(
            compile_kernel(replace(launch, constants={**launch.constants, "BY_STEPS": by}), sm)
        )
        for by in (launch.constants["BY_STEPS"], False)
    ]
    assert found[0].count("FADD") - found[1].count("FADD") == adds
