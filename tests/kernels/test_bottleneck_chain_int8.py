"""Chains of int8: the bits of three separate convolutions, by the reference and by our kernels."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from fastres.kernels import reference
from fastres.kernels.aot import compile_launch, fits
from fastres.kernels.aot.cases_int8 import chain_cases
from fastres.kernels.aot.layers import CHAINS
from fastres.kernels.bottleneck_chain import ChainScales, bottleneck_chain
from fastres.kernels.conv2d import conv2d
from fastres.kernels.cost import Target
from fastres.kernels.epilogue import ActivationKind
from fastres.kernels.tiles import ChainTile
from fastres.kernels.tiles.chain import ChainShape, chain_candidates, refusal

INT8, FP32, FP8 = torch.int8, torch.float32, torch.float8_e4m3fn
SMALL = ChainTile((1, 4, 4), 4, 3, 1)


@dataclass(frozen=True)
class Case:
    name: str
    shape: ChainShape
    bias: bool = True
    activation: ActivationKind | None = "relu"
    tile: ChainTile | None = None


CASES = (
    Case(
        "layer1.0",
        ChainShape(2, 8, 8, 64, 256, 64, projected=64),
        tile=ChainTile((2, 8, 8), 8, 3, 2),
    ),
    Case("layer1.1", ChainShape(3, 9, 8, 64, 256, 64)),
    Case("layer1.2-v1.5", ChainShape(1, 8, 8, 64, 256, 128)),
    Case("layer1.2-v1", ChainShape(2, 8, 8, 64, 256)),
    Case("layer2.0-v1.5", ChainShape(2, 8, 8, 128, 512, 128, 256, 2, 2)),
    Case("layer2.0-v1", ChainShape(1, 4, 4, 128, 512, 128, 256, 1, 2)),
    Case("layer2.1", ChainShape(9, 4, 4, 128, 512, 128), tile=ChainTile((8, 4, 4), 8, 3, 2)),
    Case("odd-sizes", ChainShape(5, 5, 7, 64, 192, 64), tile=SMALL),
    Case("odd-output-stride-2", ChainShape(3, 10, 6, 64, 128, 0, 64, 2, 2), tile=SMALL),
    Case("stride-2-residual", ChainShape(2, 8, 8, 64, 128, 64, stride=2)),
    Case("one-pixel", ChainShape(1, 1, 1, 64, 64, 64), tile=SMALL),
    Case("bare", ChainShape(1, 4, 4, 64, 64, 64), bias=False, activation=None),
    Case("batch-0", ChainShape(0, 8, 8, 64, 256, 64)),
)


@pytest.fixture(autouse=True)
def needs_boxes(request: pytest.FixtureRequest) -> None:
    """Skips on a GPU without the copy engine's boxes."""
    if "device" in request.fixturenames and request.getfixturevalue("device").type == "cuda":
        if torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("needs sm_90 or newer")


def operands(case: Case, device: torch.device, embed: Callable[..., torch.Tensor]) -> Any:
    """Tensors by name, and scales for which sums are near one and some outputs saturate."""
    random = torch.Generator().manual_seed(0)
    shape = case.shape

    def draw(*sizes: int) -> torch.Tensor:
        return embed(torch.randint(-128, 128, sizes, generator=random).to(INT8).to(device))

    def scale(size: int, depth: int, step: float) -> torch.Tensor:
        values = (0.5 + torch.rand(size, generator=random)) / (74 * step * depth**0.5)
        return embed(values.to(device))

    def bias(size: int) -> torch.Tensor | None:
        return embed(torch.randn(size, generator=random).to(device)) if case.bias and size else None

    step = shape.shortcut_stride
    tensors = {
        "a": draw(shape.n, shape.h, shape.w, shape.mid),
        "w2": draw(shape.mid, 3, 3, shape.mid),
        "w3": draw(shape.ko, 1, 1, shape.mid + shape.projected),
        "shortcut": draw(shape.n, step * shape.p, step * shape.q, shape.projected or shape.ko),
        "w1": draw(shape.next_mid, 1, 1, shape.ko) if shape.next_mid else None,
        "b2": bias(shape.mid),
        "b3": bias(shape.ko),
        "b1": bias(shape.next_mid),
    }
    scales = ChainScales(
        w2=scale(shape.mid, 9 * shape.mid, 74),
        w3=scale(shape.ko, shape.mid, 50),
        w1=scale(shape.next_mid, shape.ko, 50) if shape.next_mid else None,
        projection=scale(shape.ko, shape.projected, 74) if shape.projected else None,
        residual=1.0 if shape.projected else 0.013,
        b=53.3,
        out=41.7,
        a_next=61.1,
    )
    return tensors, scales


def meaning(case: Case, t: dict[str, Any], scales: ChainScales) -> tuple[torch.Tensor, Any]:
    """Separate convolutions; a projection is a float residual of scale 1, not rounded."""
    shape = case.shape

    def conv(x, weight, scale, bias, **more) -> torch.Tensor:
        x, weight = (v.cpu().permute(0, 3, 1, 2) for v in (x, weight))
        more = {"stride": (1, 1), "activation": case.activation} | more
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        bias = None if bias is None else bias.cpu()
        y = reference.conv2d_int8(x, weight, scale.cpu(), bias, padding=padding, **more)
        return y.permute(0, 2, 3, 1)

    b = conv(t["a"], t["w2"], scales.w2, t["b2"], stride=(shape.stride,) * 2, out_scale=scales.b)
    residual, residual_scale = t["shortcut"].cpu(), scales.residual
    if shape.projected:
        projection = t["w3"][..., shape.mid :]
        stride = (shape.shortcut_stride,) * 2
        plain = {"stride": stride, "activation": None, "dtype": FP32}
        residual = conv(t["shortcut"], projection, scales.projection, None, **plain)
    more = {
        "residual": residual.permute(0, 3, 1, 2),
        "residual_scale": residual_scale,
        "out_scale": scales.out,
    }
    out = conv(b, t["w3"][..., : shape.mid], scales.w3, t["b3"], **more)
    if not shape.next_mid:
        return out, None
    return out, conv(out, t["w1"], scales.w1, t["b1"], out_scale=scales.a_next)


def run(case: Case, t: dict[str, Any], scales: ChainScales, poisoned, device) -> Any:
    shape = case.shape
    pixels = (shape.n, shape.p, shape.q)
    out = poisoned((*pixels, shape.ko), INT8, device)
    a_next = poisoned((*pixels, shape.next_mid), INT8, device) if shape.next_mid else None
    given_out, given_next = bottleneck_chain(
        **t,
        stride=shape.stride,
        shortcut_stride=shape.shortcut_stride,
        activation=case.activation,
        scales=scales,
        out=out,
        a_next=a_next,
        tile=case.tile,
    )
    assert given_out is out and given_next is a_next
    return out, a_next


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_bits_as_the_reference(case, device, guarded, poisoned, assert_exact):
    tensors, scales = operands(case, device, guarded)
    oracle, oracle_next = meaning(case, tensors, scales)
    out, a_next = run(case, tensors, scales, poisoned, device)
    assert_exact(out, oracle)
    if oracle.numel():
        assert 0.001 < (oracle == 127).double().mean() < 0.5, "some saturate, most do not"
    if a_next is not None:
        assert_exact(a_next, oracle_next)


def test_same_bits_as_separate_kernels(device, guarded, poisoned):
    case = Case("layer1.1", ChainShape(1, 6, 6, 64, 128, 64))
    t, scales = operands(case, device, guarded)
    out, a_next = run(case, t, scales, poisoned, device)
    options: dict[str, Any] = {"activation": "relu", "padding": (1, 1)}
    b = conv2d(t["a"], t["w2"], t["b2"], scale=scales.w2, out_scale=scales.b, **options)
    options["padding"] = (0, 0)
    added = {"residual": t["shortcut"], "residual_scale": scales.residual}
    y = conv2d(b, t["w3"], t["b3"], scale=scales.w3, out_scale=scales.out, **added, **options)
    last = conv2d(y, t["w1"], t["b1"], scale=scales.w1, out_scale=scales.a_next, **options)
    assert torch.equal(out, y) and torch.equal(a_next, last)


GOOD = Case("good", ChainShape(1, 4, 4, 64, 64, 64))
MERGED = Case("merged", ChainShape(1, 4, 4, 64, 64, 64, projected=64))


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (GOOD, {"scales": None}, "scales are None, expected ChainScales"),
        (GOOD, {"w1": None}, "the scale of w1 is missing, expected one where w1 is given"),
        (GOOD, {"projection": torch.ones(64)}, "the scale of projection is given"),
        (MERGED, {"projection": None}, "the scale of projection is missing"),
        (MERGED, {"residual": 2.0}, "the residual's scale is 2.0 with a projection"),
        (GOOD, {"w2": torch.ones(63)}, r"the scale of w2 has shape \[63\], expected \[64\]"),
        (GOOD, {"w3": torch.ones(64).half()}, "the scale of w3 has dtype torch.float16"),
        (GOOD, {"b": 0.0}, "the scale of b is 0.0, expected a positive number"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_rejects(case, changes, message):
    tensors, scales = operands(case, torch.device("cpu"), lambda x: x)
    given = None if "scales" in changes else replace(scales, **changes)
    with pytest.raises(ValueError, match=message):
        bottleneck_chain(**tensors, scales=given)


def test_tiles_of_8_bits_count_a_second_sum():
    target = Target.typical(90)
    shape = ChainShape(256, 56, 56, 64, 256, 64, projected=64)
    assert refusal(shape, 1, target) is None
    tile = ChainTile((2, 8, 8), 4, 3, 2)
    assert tile.accumulators(shape, 1) == 192 and tile.accumulators(shape, 2) == 128
    assert tile in chain_candidates(shape, 2, target)
    assert tile not in chain_candidates(shape, 1, target)


CODE = [case for case in chain_cases(90) if case.name.startswith(("layer1.0", "layer2.1"))]


@pytest.mark.compile
@pytest.mark.parametrize("case", CODE, ids=lambda case: case.name)
def test_machine_code(case):
    facts = compile_launch(case.launch, 90)
    wanted = "QGMMA" if "fp8" in case.name else "IGMMA"
    assert (facts.spill_stores, facts.spill_loads) == (0, 0) and fits(facts, 90)
    assert facts.count(wanted) > 0 and not facts.count("IMMA") and not facts.count("HMMA")
    constants = case.launch.constants
    box = (constants["BOX_N"], constants["BOX_P"], constants["BOX_Q"])
    stages = (constants["CONV_STAGES"], constants["CHUNK_STAGES"])
    tile = ChainTile(box, case.launch.num_warps, *stages)
    shape = CHAINS[case.name.split(".chain")[0]]
    assert facts.shared_bytes <= tile.shared_bytes(shape, 1)
    assert not facts.count("FFMA"), "a product and a sum are rounded at once"
